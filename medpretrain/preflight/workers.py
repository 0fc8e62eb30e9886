"""The processes of the rehearsal on this host: started, watched, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

import medpretrain
from medpretrain.preflight.report import RankReport
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import dump_recipe
from medpretrain.tracking.redaction import redact

JOB_FILE = "work.json"
_GRACE_S = 5.0
_POLL_S = 0.1
_INHERITED_NOT = ("TORCHELASTIC_", "PET_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")


@dataclass(frozen=True)
class Work:
    """What every process of this host is told.

    Attributes:
        recipe: as YAML.
        host: the name by which it checked in.
        agent: the pid with which they end.
        resume, override: as of `medpretrain train`.
    """

    recipe: str
    host: str
    agent: int
    limit_s: float
    resume: str = "auto"
    override: tuple[str, ...] = ()


def report_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rehearse_here(
    recipe: Recipe,
    *,
    host: str,
    node: int,
    nodes: int,
    processes: int,
    master: tuple[str, int],
    limit_s: float,
    resume: str = "auto",
    override: tuple[str, ...] = (),
    failed_elsewhere: Callable[[], bool] = lambda: False,
    on_failure: Callable[[], None] = lambda: None,
) -> list[RankReport]:
    """The reports of this host's processes, one each, whatever became of them.

    Args:
        node: this host's place among `nodes`, each with as many `processes`.
        master: host and free port of the first.
        failed_elsewhere: asked while they run; where it says so they are ended.
        on_failure: called once when one of them has failed.
    """
    with tempfile.TemporaryDirectory(prefix="medpretrain-preflight-") as temporary:
        folder = Path(temporary)
        work = Work(dump_recipe(recipe), host, os.getpid(), limit_s, resume, override)
        (folder / JOB_FILE).write_bytes(TypeAdapter(Work).dump_json(work))
        ranks = range(node * processes, (node + 1) * processes)
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in ranks:
                started.append(_start(folder, rank, rank - ranks[0], processes, nodes * processes, master))
            why = _wait(started, limit_s, failed_elsewhere, on_failure)
        finally:
            ended = [process for process in started if process.poll() is None]
            for process in ended:
                os.killpg(process.pid, signal.SIGKILL)
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it waits in the kernel for a disk or a GPU
                    process.wait(_GRACE_S)
        return [
            _report(folder, rank, host, one, why if one in ended else None)
            for rank, one in zip(ranks, started, strict=True)
        ]


def _start(
    folder: Path, rank: int, local_rank: int, local_world: int, world: int, master: tuple[str, int]
) -> subprocess.Popen[bytes]:
    place = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_world,
        "MASTER_ADDR": master[0],
        "MASTER_PORT": master[1],
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_INHERITED_NOT)}
    environment |= {key: str(value) for key, value in place.items()}
    # The code that this process runs, and not what lies in the working folder.
    roots = [str(Path(medpretrain.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    with _log(folder, rank).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "medpretrain.preflight.worker", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait(
    started: Sequence[subprocess.Popen[bytes]],
    limit_s: float,
    failed_elsewhere: Callable[[], bool],
    on_failure: Callable[[], None],
) -> str | None:
    """Until all have ended, or have to be; gives why those that have not must."""
    deadline, failed = time.monotonic() + limit_s, False
    ended_by = f"took longer than {limit_s:.0f} s"
    while any(process.poll() is None for process in started):
        if time.monotonic() > deadline:
            if not failed:
                on_failure()
            return ended_by
        if not failed and any(process.poll() not in (None, 0) for process in started):
            failed = True
            # The others may have more to say of it.
            deadline, ended_by = min(deadline, time.monotonic() + _GRACE_S), "another"
            on_failure()
        elif not failed and failed_elsewhere():
            failed = True
            deadline, ended_by = min(deadline, time.monotonic() + _GRACE_S), "another"
        time.sleep(_POLL_S)
    if not failed and any(process.returncode for process in started):
        on_failure()
    return None


def _report(folder: Path, rank: int, host: str, process: subprocess.Popen[bytes], why: str | None) -> RankReport:
    """What a process wrote, and what it could not write any more."""
    try:
        report = TypeAdapter(RankReport).validate_json(report_file(folder, rank).read_text())
    except FileNotFoundError:
        report = RankReport(rank, host)
    code = process.returncode
    if report.error is not None or code == 0:
        return report
    if why is not None:
        if why == "another":
            return replace(report, error=f"ended at {report.stage}: another process failed", consequence=True)
        return replace(report, error=f"{report.stage} {why}")
    lines = _log(folder, rank).read_text(errors="replace").strip().splitlines()
    said = f"; it said: {redact(lines[-1])[:500]}" if lines else ""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    memory = " (out of memory?)" if code == -signal.SIGKILL else ""
    return replace(report, error=f"it {how}{memory} at {report.stage}{said}")


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"
