"""What is kept in RUN/tracking: one file for the run, and one for each MLflow server it was sent to."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from data_prep.errors import UserError
from medpretrain.tracking.redaction import redact

TRACKING_FOLDER = "tracking"
# Of the run folder; the training process holds it.
_RUN_LOCK = ".lock"

_log = logging.getLogger(__name__)


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is seen whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(slots=True)
class RunState:
    """RUN/tracking/run.json: the tag by which a server's copy of this run is found again, and how the run ended.

    `status` is MLflow's word: RUNNING, FINISHED, FAILED or KILLED; `ended` in seconds since 1970.
    """

    key: str
    status: str = "RUNNING"
    ended: float | None = None

    @classmethod
    def of(cls, run: Path) -> Self:
        """The state of a run; a new one is written down before anything is done with it.

        Raises:
            UserError: the file is broken.
        """
        path = run / TRACKING_FOLDER / "run.json"
        if path.exists():
            return cls(**_read(path, {field.name for field in fields(cls)}))
        fresh = cls(key=secrets.token_hex(16))
        fresh.write(run)
        return fresh

    def write(self, run: Path) -> None:
        write_whole(run / TRACKING_FOLDER / "run.json", json.dumps(asdict(self), indent=2))

    def set(self, run: Path, status: str) -> None:
        """Keep how the run stands now."""
        self.status, self.ended = status, None if status == "RUNNING" else time.time()
        self.write(run)

    def shown(self, run: Path) -> str:
        """The status; a run that says it is running and that no process holds was killed."""
        return "KILLED" if self.status == "RUNNING" and not _is_held(run / _RUN_LOCK) else self.status


@dataclass(slots=True)
class ServerState:
    """RUN/tracking/mlflow-HASH.json: the MLflow run on one server, and how much of metrics.jsonl it has acknowledged.

    HASH is of the server's address without its secrets. (`step`, `nth`) is the position of the last row acknowledged;
    `rollbacks_read` counts the bytes of metrics.rolled_back.jsonl that this takes into account, `since` those that were
    there before the server had anything.
    """

    run_id: str | None = None
    step: int = -1
    nth: int = 0
    rollbacks_read: int = 0
    since: int = 0

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is none, or a broken one: the run is then found by its tag and everything sent again."""
        if not path.exists():
            return None
        try:
            return cls(**_read(path, {field.name for field in fields(cls)}))
        except UserError as error:
            _log.warning("%s; all metrics are sent again", error)
            return None

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=2))


def server_file(run: Path, uri: str) -> Path:
    """Where the state of a server is kept; the address may hold a password, so its hash names the file."""
    return run / TRACKING_FOLDER / f"mlflow-{hashlib.sha256(redact(uri).encode()).hexdigest()[:16]}.json"


@contextmanager
def only_sender(server: Path) -> Iterator[None]:
    """Two processes never send the same run to the same server at once.

    Raises:
        BlockingIOError: another one does.
    """
    server.parent.mkdir(parents=True, exist_ok=True)
    with server.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError("another process is sending this run there") from None
        yield


def _is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read(path: Path, names: set[str]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict) or set(data) != names:
        raise UserError(f"{path} is not what was written there; move it away")
    return data
