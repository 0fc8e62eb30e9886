"""What rank 0 writes down of a run while it goes on."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from medpretrain.checkpoints import CheckpointInfo
from medpretrain.health.last_words import append_row
from medpretrain.methods import method_class
from medpretrain.recipe import Recipe
from medpretrain.tracking.metrics_log import MetricsLog, read_metrics
from medpretrain.tracking.of_run import RunTracking
from medpretrain.tracking.system import system_metrics
from medpretrain.training.collapse import CollapseAlarm, representation
from medpretrain.training.display import Display
from medpretrain.training.process import Process
from medpretrain.training.trainer import Measured

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger(__name__)


def note(run: Path, event: Mapping[str, Any]) -> None:
    """Add what happened to RUN/events.jsonl; a full disk is no reason to stop."""
    try:
        append_row(run / EVENTS_FILE, {"time": time.time(), **event})
    except OSError as error:
        _log.warning("%s cannot be written (%s): %s", run / EVENTS_FILE, error.strerror, dict(event))


class Reporter:
    """Rank 0's voice: metrics.jsonl first, then the display; trackers follow the file. On other ranks it is silent."""

    def __init__(self, recipe: Recipe, start: int) -> None:
        self._run, self._batch = recipe.run_dir, recipe.train.global_batch
        self._step, self._time, self._waited = start, time.perf_counter(), 0.0
        self._full = False
        self.last: dict[str, Any] = {}
        self.log: MetricsLog | None = None
        self.alarm: CollapseAlarm | None = None
        self.display: Display | None = None

    def waited(self, seconds: float) -> None:
        """For a batch."""
        self._waited += seconds

    def report(
        self, step: int, loss: float, measured: Measured, features_NVD: Tensor, epoch: float, counts: Mapping[str, int]
    ) -> None:
        """A row of metrics.

        Args:
            loss: of the global batch.
            features_NVD: of the global batch.
            counts: of faults, since the run began.
        """
        now = time.perf_counter()
        if self.log is not None and self.alarm is not None and self.display is not None:
            seconds = now - self._time
            self.last = row = {
                "step": step,
                "epoch": round(epoch, 4),
                "loss": loss,
                "lr": measured.lr,
                "grad_norm": measured.grad_norm.item(),
                **representation(features_NVD),
                "images_per_s": (step - self._step) * self._batch / seconds,
                "data_wait": self._waited / seconds,
                **counts,
                **system_metrics(self._run),
            }
            self._write(row)
            self.display.update(row, self.alarm.update(row))
        self._step, self._time, self._waited = step, now, 0.0

    def flush(self) -> None:
        """Metrics reach the disk before the checkpoint that follows them."""
        if self.log is not None:
            try:
                self.log.sync()
            except OSError as error:
                self._say_full(error)

    def back_to(self, step: int) -> None:
        """Rows of later steps are dropped: they are measured again."""
        if self.log is not None:
            self.log.truncate_after(step)
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    def _write(self, row: dict[str, Any]) -> None:
        assert self.log is not None
        try:
            self.log.append(row)
        except OSError as error:  # the row waits in the log and is written with the next that can be
            self._say_full(error)
        else:
            self._full = False

    def _say_full(self, error: OSError) -> None:
        if error.errno not in _FULL:
            raise error
        if not self._full:
            _log.warning("the disk of %s is full: metrics wait in memory until there is room", self._run)
        self._full = True


@contextmanager
def reporting(recipe: Recipe, about: CheckpointInfo, process: Process, total: int, start: int) -> Iterator[Reporter]:
    """A run's reporter; on rank 0 with its files, its display and its trackers."""
    reporter, run = Reporter(recipe, start), recipe.run_dir
    if not process.leads:
        yield reporter
        return
    with ExitStack() as stack:
        reporter.log = stack.enter_context(MetricsLog(run / METRICS_FILE))
        reporter.log.truncate_after(start)
        stack.enter_context(RunTracking(recipe, about.dataset_sha256, process.world))
        method = method_class(recipe.method["name"])
        earlier = read_metrics(run / METRICS_FILE)
        reporter.alarm = CollapseAlarm(method.collapse_causes, by_rank=method.labels == "none", earlier=earlier)
        reporter.display = stack.enter_context(Display(total, start_step=start))
        yield reporter
