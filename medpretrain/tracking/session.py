"""The calls to MLflow, each safe to make twice."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from medpretrain.tracking.follow import Follower, Point
from medpretrain.tracking.keys import safe_key, split_params
from medpretrain.tracking.metrics_log import Placed, Position, read_rollbacks
from medpretrain.tracking.redaction import redact
from medpretrain.tracking.state import RunState, ServerState, server_file

# MLflow's own limits.
_METRICS_A_CALL = 1000
_PARAMS_A_CALL = 100
RUN_TAG = "medpretrain.run"
"""Of an MLflow run: `RunState.key` of the run folder that it is of."""

# Set unless the user has: our own back-off replaces MLflow's four minutes of silent retries; no chatter on the console;
# no usage statistics from a hospital to MLflow's makers.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}

_log = logging.getLogger(__name__)


def default_uri(run: Path, uri: str | None) -> str:
    """The tracking URI: the one given, or $MLFLOW_TRACKING_URI, or a SQLite file beside the run folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"


def artifact_location(uri: str) -> str | None:
    """Of a new experiment: beside a SQLite file; MLflow would take a folder of wherever the process was started."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def failures() -> tuple[type[Exception], ...]:
    """What MLflow and the stores under it raise; requests' errors are OSErrors. Imports MLflow, which takes seconds.

    Raises:
        ImportError: MLflow is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow
    import sqlalchemy.exc

    return (mlflow.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError, ImportError, UserError)


class Session:
    """A run's place on one MLflow server.

    Args:
        run: the run folder.
        uri: the server.
    """

    def __init__(self, run: Path, uri: str) -> None:
        from mlflow import MlflowClient

        self.unattached: list[Path] = []
        """Files that could not be stored."""
        self._client = MlflowClient(uri)
        self._uri = uri
        self._metrics = run / "metrics.jsonl"
        self._run_state = RunState.of(run)
        self._file = server_file(run, uri)

    def start(self, experiment: str, run_name: str, params: Mapping[str, str], start_ms: int | None = None) -> Follower:
        """Make the run, or find it again, and log its parameters; gives the rows it lacks."""
        found = ServerState.read(self._file)
        self._state = found or self._fresh()
        run = self._known() if self._state.run_id else None
        if run is None:
            run = self._find_or_create(experiment, run_name, start_ms, lost=found is None)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self.run_id: str = run.info.run_id
        self._state.run_id = self.run_id
        self._state.write(self._file)
        self._log_params(params, run.data.params)
        state = self._state
        return Follower(self._metrics, (state.step, state.nth), state.rollbacks_read, state.since)

    def _fresh(self) -> ServerState:
        rollbacks = read_rollbacks(self._metrics)
        end = rollbacks[-1].end if rollbacks else 0
        return ServerState(rollbacks_read=end, since=end)

    def _known(self) -> Any | None:
        """The run that was sent to before; None if the server has it no more, for example with a new database."""
        from mlflow import MlflowException

        try:
            return self._client.get_run(self._state.run_id)
        except MlflowException as error:
            if not is_gone(error):
                raise
        _log.warning("MLflow at %s no longer has this run: all of it is sent again", redact(self._uri))
        self._state = self._fresh()
        return None

    def _find_or_create(self, experiment: str, run_name: str, start_ms: int | None, lost: bool) -> Any:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            experiment_id = self._client.create_experiment(experiment, artifact_location=artifact_location(self._uri))
        else:
            experiment_id = found.experiment_id
        # The tag finds a run whose creation was not acknowledged, or whose state file is gone.
        key = self._run_state.key
        runs = self._client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{key}'", max_results=1)
        if runs:
            if lost:
                self._state.since = 0
            return runs[0]
        self._state.write(self._file)
        return self._client.create_run(experiment_id, start_time=start_ms, run_name=run_name, tags={RUN_TAG: key})

    def _log_params(self, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        split = split_params(params)
        changed = sorted(key for key, value in split.items() if known.get(key, value) != value)
        if changed:
            _log.warning("MLflow keeps the first value of parameters that have changed since: %s", ", ".join(changed))
        new = [Param(key, value) for key, value in split.items() if key not in known]
        for start in range(0, len(new), _PARAMS_A_CALL):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_CALL])

    def attach(self, artifacts: Iterable[Path], expected: tuple[type[Exception], ...]) -> None:
        """Attach files, and those that could not be stored before; one that cannot does not hold up the metrics."""
        again, self.unattached = self.unattached, []
        for artifact in dict.fromkeys([*artifacts, *again]):
            try:
                self._client.log_artifact(self.run_id, str(artifact))
            except expected as error:
                if artifact not in again:
                    _log.warning("MLflow did not take the file %s: %s", artifact, brief(error, self._uri))
                self.unattached.append(artifact)

    def points_there(self) -> set[Point]:
        """Every point that the server has of this run, under MLflow's names and with the values it stores."""
        keys = self._client.get_run(self.run_id).data.metrics
        return {
            Point(key, _stored(point.value), point.timestamp, point.step)
            for key in keys
            for point in self._client.get_metric_history(self.run_id, key)
        }

    def send(self, rows: Sequence[Placed], follower: Follower, there: set[Point] | None = None) -> int:
        """Send whole rows, but for points that are there, and note them as sent; gives how many points were sent."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, point.value, point.time_ms, point.step)
            for placed in rows
            for point in follower.points(placed)
            for key in (safe_key(point.name),)
            if not there or point._replace(name=key, value=_stored(point.value)) not in there
        ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_A_CALL])
        follower.position = rows[-1][0]
        self._keep(follower.position, follower.rollbacks_read)
        return len(metrics)

    def _keep(self, position: Position, rollbacks_read: int) -> None:
        self._state.step, self._state.nth = position
        self._state.rollbacks_read = rollbacks_read
        self._state.write(self._file)

    def end(self, status: str, end_ms: int | None = None) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.run_id, status, end_ms)


def first_batch(rows: Sequence[Placed], follower: Follower) -> Sequence[Placed]:
    """The first rows that fit into one call; a row that alone does not fit is sent in several."""
    size = 0
    for count, placed in enumerate(rows):
        size += len(follower.points(placed))
        if count and size > _METRICS_A_CALL:
            return rows[:count]
    return rows


def brief(error: Exception, uri: str) -> str:
    """What went wrong, in one line without secrets."""
    text = " ".join(redact(str(error), uri).split())
    return f"{type(error).__name__}: {text[:300]}"


def is_gone(error: Exception) -> bool:
    """Whether MLflow answered that it does not know the run."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _stored(value: float) -> float:
    """As MLflow's SQL store keeps a value: infinities as the largest number, and NaN as 0 with a mark beside it."""
    if math.isnan(value):
        return math.inf  # no stored value is: a NaN then equals a NaN
    return max(-sys.float_info.max, min(sys.float_info.max, value))
