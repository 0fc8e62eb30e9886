"""MLflow, fed from the metrics file of the run folder; training never waits for it and never fails with it.

A thread reads what `metrics_log` wrote and sends it. What the server has acknowledged is kept in RUN/mlflow.json, so a
run resumed in the same folder goes on in the same MLflow run and sends no row twice. A batch whose acknowledgement was
lost is sent again with the same timestamps, which MLflow's SQL store keeps once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.errors import UserError
from medpretrain.training.metrics_log import MetricsTail, Row

# MLflow's own limits.
_METRICS_A_CALL = 1000
_PARAMS_A_CALL = 100
_LONGEST_PARAM = 6000
_LONGEST_KEY = 250

_ROWS_A_READ = 500
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_TAG = "medpretrain.run"

# Set unless the user has: our own back-off replaces MLflow's four minutes of silent retries; no chatter on the console;
# no usage statistics from a hospital to MLflow's makers.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_log = logging.getLogger(__name__)

_Placed = tuple[tuple[int, int], Row]  # a row and its position in the file


@dataclass(slots=True)
class _Acknowledged:
    """RUN/mlflow.json: which MLflow run this is and what it has.

    `key` tags the MLflow run, so that one whose creation was not acknowledged is found again. `uri_sha256` notices
    another server; the address itself may hold a password. (`step`, `nth`) is the position of the last row sent.
    """

    key: str
    uri_sha256: str
    run_id: str | None = None
    step: int = -1
    nth: int = 0


class Tracker:
    """Sends a run's metrics, parameters and files to MLflow in the background; for rank 0 alone.

    Creating it starts a daemon thread and returns at once. Failures are warned of once an outage and retried after
    1 s to 60 s; rows wait in metrics.jsonl meanwhile.

    Args:
        run: the run folder, with `metrics.jsonl` in it (or later).
        uri: MLflow's tracking URI; None: $MLFLOW_TRACKING_URI, or else a SQLite file beside the run folder
            (`../mlflow.db`); "none": no tracking.
        experiment: MLflow's name for the experiment, made if it is not there.
        run_name: what MLflow shows for the run.
        params: logged once; values above MLflow's 6,000 characters are split over `key.1`, `key.2`, ...
        artifacts: files to attach, at each start.
        interval_s: seconds between two looks at the metrics.
    """

    def __init__(
        self,
        run: Path,
        uri: str | None,
        experiment: str,
        run_name: str,
        params: Mapping[str, str],
        artifacts: Sequence[Path],
        interval_s: float = 5.0,
    ) -> None:
        run = run.resolve()
        if uri is None:
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.parent / 'mlflow.db'}"
        self._run, self._uri = run, uri
        self._experiment, self._run_name = experiment, run_name
        self._params, self._artifacts = dict(params), list(artifacts)
        self._interval_s = interval_s
        self._metrics = run / "metrics.jsonl"
        self._file = run / "mlflow.json"
        self._position = (-1, 0)  # of the last row acknowledged
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        if uri != "none":
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self._acknowledged = self._read_acknowledged()
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float, status: str = "FINISHED") -> None:
        """Send what is left and end the MLflow run; gives up after `timeout_s` with one warning that counts the rest.

        Args:
            timeout_s: longest time to wait, in seconds.
            status: how MLflow shows the run: "FINISHED", "FAILED" or "KILLED".
        """
        if self._thread is None:
            return
        self._status, self._deadline = status, time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        self._thread = None
        try:
            tail, unsent = MetricsTail(self._metrics), 0
            while rows := self._next_rows(tail):
                unsent += len(rows)
        except (UserError, OSError) as error:
            _log.warning("MLflow may lack rows: %s", error)
            return
        if unsent:
            _log.warning(
                "%d rows were not sent to MLflow at %s; they are in %s", unsent, redact(self._uri), self._metrics
            )

    def _work(self) -> None:
        """The thread: connect, then send what comes, with one warning and a growing wait for each outage."""
        try:
            import mlflow  # here, since it takes seconds
            import sqlalchemy.exc
        except ImportError as error:
            _log.warning("no tracking: MLflow cannot be imported (%s)", error)
            return
        # What MLflow and the stores under it raise; requests' errors are OSErrors.
        failures = (mlflow.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError, ImportError, UserError)
        tail = MetricsTail(self._metrics)
        pending: Sequence[_Placed] = []
        session: _Session | None = None
        wait_s = _FIRST_WAIT_S
        failing = False
        while True:
            last = self._closing.is_set()
            try:
                if session is None:
                    session = _Session(mlflow.MlflowClient(self._uri), self._uri, self._acknowledged, self._file)
                    session.start(self._experiment, self._run_name, self._params)
                    session.attach(self._artifacts, failures)
                while pending := pending or self._next_rows(tail):
                    batch = _first_batch(pending)
                    self._position = session.send(batch)
                    pending = pending[len(batch) :]
                if last:
                    session.end(self._status)
                    return
            except failures as error:
                if not failing:
                    _log.warning(
                        "no metrics reach MLflow at %s (%s: %s); they are in %s and will be sent, training goes on",
                        redact(self._uri), type(error).__name__, redact(str(error), self._uri), self._metrics,
                    )  # fmt: skip
                failing = True
                if session is not None and not session.started:
                    session = None
                if last:
                    if time.monotonic() + _FIRST_WAIT_S > self._deadline:
                        return
                    time.sleep(_FIRST_WAIT_S)
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            else:
                if failing:
                    _log.warning("MLflow at %s works again", redact(self._uri))
                failing, wait_s = False, _FIRST_WAIT_S
                self._closing.wait(self._interval_s)

    def _next_rows(self, tail: MetricsTail) -> list[_Placed]:
        """The next rows that are not acknowledged yet; none at the end of the file."""
        while rows := tail.read(_ROWS_A_READ):
            if new := [placed for placed in rows if placed[0] > self._position]:
                return new
        return []

    def _read_acknowledged(self) -> _Acknowledged:
        uri_sha256 = hashlib.sha256(redact(self._uri).encode()).hexdigest()
        fresh = _Acknowledged(key=secrets.token_hex(16), uri_sha256=uri_sha256)
        if not self._file.exists():
            return fresh
        try:
            found = _Acknowledged(**json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s cannot be used (%s): all metrics go to a new MLflow run", self._file, error)
            return fresh
        if found.uri_sha256 != uri_sha256:
            _log.warning("%s is of another MLflow server: all metrics go to a new run", self._file)
            return fresh
        self._position = (found.step, found.nth)
        return found


class _Session:
    """The calls to MLflow, each safe to make twice."""

    def __init__(self, client: Any, uri: str, acknowledged: _Acknowledged, file: Path) -> None:
        self.started = False
        self._client = client
        self._uri = uri
        self._acknowledged = acknowledged
        self._file = file

    def start(self, experiment: str, run_name: str, params: Mapping[str, str]) -> None:
        """Make the run, or find it again, and log its parameters."""
        known = self._acknowledged.run_id
        run = self._client.get_run(known) if known else self._find_or_create(experiment, run_name)
        if known:
            self._client.update_run(known, status="RUNNING")
        self._run_id: str = run.info.run_id
        self._acknowledged.run_id = self._run_id
        self._write()
        self._log_params(params, run.data.params)
        self.started = True

    def _find_or_create(self, experiment: str, run_name: str) -> Any:
        self._write()  # the key first: a creation whose answer is lost is found by it
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            experiment_id = self._client.create_experiment(experiment, artifact_location=self._artifact_location())
        else:
            experiment_id = found.experiment_id
        key = self._acknowledged.key
        runs = self._client.search_runs([experiment_id], f"tags.`{_TAG}` = '{key}'", max_results=1)
        return runs[0] if runs else self._client.create_run(experiment_id, run_name=run_name, tags={_TAG: key})

    def _artifact_location(self) -> str | None:
        """Beside a SQLite file; MLflow would take a folder of wherever the process was started."""
        if not self._uri.startswith("sqlite:///"):
            return None
        return (Path(self._uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()

    def _log_params(self, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        split = split_params(params)
        changed = sorted(key for key, value in split.items() if known.get(key, value) != value)
        if changed:
            _log.warning("MLflow keeps the first value of parameters that have changed since: %s", ", ".join(changed))
        new = [Param(key, value) for key, value in split.items() if key not in known]
        for start in range(0, len(new), _PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=new[start : start + _PARAMS_A_CALL])

    def attach(self, artifacts: Iterable[Path], failures: tuple[type[Exception], ...]) -> None:
        """Attach files; one that cannot be stored is named and does not hold up the metrics."""
        for artifact in artifacts:
            try:
                self._client.log_artifact(self._run_id, str(artifact))
            except failures as error:
                _log.warning("MLflow did not take the file %s: %s", artifact, redact(str(error), self._uri))

    def send(self, rows: Sequence[_Placed]) -> tuple[int, int]:
        """Send whole rows and note them as sent; gives the position of the last."""
        from mlflow.entities import Metric

        metrics = [
            Metric(safe_key(name), value, int(row.get("time", 0) * 1000), row["step"])
            for _, row in rows
            for name, value in _numbers(row)
        ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS_A_CALL])
        position = rows[-1][0]
        self._acknowledged.step, self._acknowledged.nth = position
        self._write()
        return position

    def end(self, status: str) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run_id, status)

    def _write(self) -> None:
        temporary = self._file.with_name(f".tmp-{self._file.name}")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(asdict(self._acknowledged), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._file)


def _first_batch(rows: Sequence[_Placed]) -> Sequence[_Placed]:
    """The first rows that fit into one call; a row that alone does not fit is sent in several."""
    size = 0
    for count, (_, row) in enumerate(rows):
        size += sum(1 for _ in _numbers(row))
        if count and size > _METRICS_A_CALL:
            return rows[:count]
    return rows


def _numbers(row: Row) -> Iterable[tuple[str, float]]:
    for name, value in row.items():
        if name not in ("step", "time") and isinstance(value, (int, float)):
            yield name, float(value)


def safe_key(name: str) -> str:
    """A name MLflow takes: letters, digits and `_-./ `, no path tricks, at most 250 characters.

    A name that had to change ends in a piece of its hash, so that no two become one.

    >>> safe_key("train/loss"), safe_key("top@5")
    ('train/loss', 'top_5-e67973')
    """
    key = re.sub(r"[^A-Za-z0-9_./ -]", "_", name)
    if not key or posixpath.normpath(key) != key or key.startswith(("/", ".")):
        key = re.sub(r"[./]", "_", key)
    if key == name and len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def split_params(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters with keys MLflow takes and no value above the length at which it cuts.

    >>> {key: len(value) for key, value in split_params({"lr": "0.1", "recipe": "x" * 6001}).items()}
    {'lr': 3, 'recipe.1': 6000, 'recipe.2': 1}
    """
    split: dict[str, str] = {}
    for name, value in params.items():
        if len(value) <= _LONGEST_PARAM:
            split[safe_key(name)] = value
            continue
        for start in range(0, len(value), _LONGEST_PARAM):
            split[safe_key(f"{name}.{start // _LONGEST_PARAM + 1}")] = value[start : start + _LONGEST_PARAM]
    return split


def redact(text: str, uri: str = "") -> str:
    """`text` without the passwords and tokens that URIs in it, `uri` or MLflow's environment variables hold.

    >>> redact("cannot reach https://me:secret@mlflow.example/api?token=abc")
    'cannot reach https://***@mlflow.example/api?token=***'
    """
    credentials = re.match(r"[\w+.-]+://(\S*)@", uri)
    known = [os.environ.get(name, "") for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")]
    if credentials:
        password = credentials[1].partition(":")[2]
        known += [password, unquote(password), credentials[1]]
    for secret in sorted(filter(None, known), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"([\w+.-]+://)[^\s'\"]*@", r"\1***@", text)
    return re.sub(r"(?i)(\b[\w-]*(?:password|token|secret|key)=)[^&\s'\"]+", r"\1***", text)
