"""MLflow, fed from the metrics file of the run folder; training never waits for it and never fails with it.

A thread reads what `metrics_log` wrote and sends it. What a server has acknowledged is kept in RUN/tracking, so a run
resumed in the same folder goes on in the same MLflow run and sends no row twice. A batch whose acknowledgement was
lost is sent again with the same timestamps, which MLflow's SQL store keeps once.

MLflow cannot take a point back. Where a run went back to a checkpoint and measured steps again, a server that already
had those steps keeps what it was sent: a point measured again with the same value stays one point, and where the value
differs both are shown at that step, the abandoned one with the earlier time. `metrics.jsonl` has what counts, and
`medpretrain sync` to another server sends just that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from data_prep.errors import UserError
from medpretrain.tracking.follow import Follower
from medpretrain.tracking.redaction import redact
from medpretrain.tracking.session import Session, brief, default_uri, failures, first_batch, is_gone
from medpretrain.tracking.state import RunState, ServerState, only_sender, server_file

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0

_log = logging.getLogger(__name__)


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

    Raises:
        UserError: the run folder holds a state of tracking that cannot be read.
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
        self._run = run = run.resolve()
        self._uri = default_uri(run, uri)
        self._experiment, self._run_name = experiment, run_name
        self._params, self._artifacts = dict(params), list(artifacts)
        self._interval_s = interval_s
        self._metrics = run / "metrics.jsonl"
        self._follower: Follower | None = None
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        RunState.of(run).set(run, "RUNNING")
        if uri != "none":
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float, status: str = "FINISHED", artifacts: Sequence[Path] = ()) -> None:
        """Send what is left and end the MLflow run; gives up after `timeout_s` with one warning that counts the rest.

        Args:
            timeout_s: longest time to wait, in seconds.
            status: how MLflow shows the run: "FINISHED", "FAILED" or "KILLED".
            artifacts: files to attach at the end.
        """
        if self._closing.is_set():
            return
        RunState.of(self._run).set(self._run, status)
        self._status, self._deadline = status, time.monotonic() + timeout_s
        self._artifacts += artifacts
        self._closing.set()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        try:
            unsent = self._count_unsent()
        except (UserError, OSError) as error:
            _log.warning("MLflow may lack rows: %s", error)
            return
        if unsent:
            _log.warning(
                "%d rows were not sent to MLflow at %s; they are in %s: `medpretrain sync %s` sends them later",
                unsent, redact(self._uri), self._metrics, self._run,
            )  # fmt: skip

    def _work(self) -> None:
        """The thread: connect, then send what comes, with one warning and a growing wait for each outage."""
        try:
            expected = failures()
        except ImportError as error:
            _log.warning("no tracking: MLflow cannot be imported (%s)", error)
            return
        with ExitStack() as lock:
            self._send(expected, lock)

    def _send(self, expected: tuple[type[Exception], ...], lock: ExitStack) -> None:
        locked = False
        session: Session | None = None
        attached = 0
        wait_s = _FIRST_WAIT_S
        failing = False
        while True:
            last = self._closing.is_set()
            try:
                if not locked:
                    lock.enter_context(only_sender(server_file(self._run, self._uri)))
                    locked = True
                if session is None or self._follower is None:
                    session = Session(self._run, self._uri)
                    self._follower = session.start(self._experiment, self._run_name, self._params)
                if attached < len(self._artifacts) or (last and session.unattached):
                    new, attached = self._artifacts[attached:], len(self._artifacts)
                    session.attach(new, expected)
                while rows := self._follower.rows():
                    session.send(first_batch(rows, self._follower), self._follower)
                if last:
                    session.end(self._status)
                    return
            except expected as error:
                if not failing:
                    _log.warning(
                        "no metrics reach MLflow at %s (%s); they are in %s and will be sent, training goes on",
                        redact(self._uri), brief(error, self._uri), self._metrics,
                    )  # fmt: skip
                failing = True
                if is_gone(error):
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

    def _count_unsent(self) -> int:
        """Rows that the server has not acknowledged."""
        state = ServerState.read(server_file(self._run, self._uri)) or ServerState()
        follower, unsent = Follower(self._metrics, (state.step, state.nth), state.rollbacks_read), 0
        while rows := follower.rows():
            unsent += len(rows)
            follower.position = rows[-1][0]
        return unsent
