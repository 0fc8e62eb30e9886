"""The steps of a run: train, report, save, and what is done about faults."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from data_prep.errors import WorkFailed
from medpretrain.checkpoints import Found, Saver, Target, load, newest
from medpretrain.data.batches import Batch, Stream
from medpretrain.health.preemption import Preempted, Preemption
from medpretrain.health.watchdog import Watchdog
from medpretrain.recipe import Recipe
from medpretrain.training.collapse import of_global_batch
from medpretrain.training.process import Process
from medpretrain.training.reporting import Reporter, note
from medpretrain.training.survey import Surveyor
from medpretrain.training.trainer import Measured, Trainer, mean_loss

_log = logging.getLogger(__name__)


class RunFailed(WorkFailed):
    """Training cannot go on; the message names the cause and the step."""


@dataclass
class Steps:
    """A run from a step to its last.

    Attributes:
        total: steps of the whole run.
        facts: of the datasets, for the checkpoint.
        skipped: steps whose update was left out, since the run began.
    """

    recipe: Recipe
    process: Process
    stream: Stream
    trainer: Trainer
    surveyor: Surveyor
    reporter: Reporter
    target: Target
    saver: Saver
    watchdog: Watchdog
    preemption: Preemption
    facts: dict[str, Any]
    total: int
    skipped: int = 0
    _streak: int = 0
    _rollbacks: int = 0
    _failed_at: int = 0
    _saved: int = 0

    def run(self, step: int) -> Found:
        """Train from `step` to the end; gives the last checkpoint.

        Raises:
            Preempted: a signal asked for it; the checkpoint is committed.
            RunFailed: too many steps that are not finite, or the last checkpoint could not be saved.
        """
        self._saved = step
        batches = self.stream.batches(step)
        try:
            while step < self.total:
                measured = self._step(step, batches)
                step += 1
                self._streak = 0 if measured.finite else self._streak + 1
                if not measured.finite:
                    self._skip(step)
                if self._streak > self.recipe.faults.skip:
                    batches.close()
                    step = self._roll_back(step)
                    batches = self.stream.batches(step)
                    continue
                if step == self.total or step % self.recipe.train.log_every == 0:
                    self._report(step, measured)
                asked = self.preemption.agreed(step)
                due = step == self.total or asked is not None
                # After a step that was left out it waits for a good one: weights that cause faults are no way back.
                if due or (step >= self._next_save and not self._streak):
                    self._save(step)
                if asked is not None and step < self.total:
                    self._leave(step, asked)
        finally:
            batches.close()
        self.watchdog.mark(step, "save")
        return self._last(step)

    def _step(self, step: int, batches: Generator[Batch]) -> Measured:
        self.watchdog.mark(step, "data")
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        self.reporter.waited(waited)
        self.watchdog.waited_for_data(waited)
        self.surveyor.before_step(self.trainer.method, self.trainer.progress(step))
        self.watchdog.mark(step, "step")
        return self.trainer.step(batch)

    def _report(self, step: int, measured: Measured) -> None:
        self.watchdog.mark(step, "log")
        features = of_global_batch(measured.features)
        counts = {"skipped_steps": self.skipped, "replaced_samples": self.stream.replaced}
        self.reporter.report(
            step, mean_loss(measured.loss), measured, features, step / self.stream.steps_per_epoch, counts
        )

    def _note(self, event: str, step: int, **more: Any) -> None:
        if self.process.leads:
            note(self.recipe.run_dir, {"event": event, "step": step, **more})

    @property
    def _next_save(self) -> int:
        every = self.recipe.checkpoint.every
        return (self._saved // every + 1) * every

    def _save(self, step: int) -> None:
        self.watchdog.mark(step, "save")
        self.reporter.flush()
        metric = self.reporter.last.get(self.recipe.checkpoint.keep_best or "")
        extra = {"dataset": self.facts, "skipped_steps": self.skipped}
        self.saver.save(step, self.trainer.parts(), extra, metric if isinstance(metric, int | float) else None)
        self._saved = step
        self._tell_outcomes()

    def _tell_outcomes(self) -> None:
        for outcome in self.saver.outcomes():
            if outcome.error is not None:
                self._note("save_failed", outcome.step, cause=outcome.error)
            elif outcome.step >= self._failed_at:
                self._rollbacks = 0  # the run got past what it was taken back from

    def _last(self, step: int) -> Found:
        """The checkpoint of this step, once it is written.

        Raises:
            RunFailed: it could not be saved.
        """
        found = self.saver.wait()
        outcomes = self.saver.outcomes()
        if found is None or found.step != step:
            causes = [outcome.error for outcome in outcomes if outcome.error]
            raise RunFailed(f"the checkpoint of step {step} could not be saved: {'; '.join(filter(None, causes))}")
        return found

    def _leave(self, step: int, asked: str) -> None:
        self.watchdog.mark(step, "save")
        self._note("preempted", step, signal=asked)
        found = self._last(step)
        raise Preempted(f"{asked} at step {step} of {self.total}; the checkpoint is committed: {found}")

    def _skip(self, step: int) -> None:
        self.skipped += 1
        self._note("skipped", step, cause="the loss or the gradient is not finite")
        _log.warning("step %d is left out: its loss or gradient is not finite", step)

    def _roll_back(self, step: int) -> int:
        """Go on from the last good checkpoint.

        Raises:
            RunFailed: it has been tried often enough, or there is none.
        """
        cures = "A lower optim.lr, a longer optim.warmup or optim.clip are the usual cures"
        what = f"the loss or the gradient was not finite in {self._streak} steps up to {step}"
        self.watchdog.mark(step, "save")
        self.saver.wait()
        self._tell_outcomes()
        if self._rollbacks >= self.recipe.faults.rollbacks:
            again = f" again, after {self._rollbacks} rollback{'s' * (self._rollbacks > 1)}" if self._rollbacks else ""
            raise RunFailed(f"{what}{again}. {cures}")
        found = newest(self.target, self.process)
        if found is None:
            raise RunFailed(f"{what}, and there is no checkpoint yet to go back to. {cures}")
        load(found, self.trainer.parts(), self.process)
        self.trainer.loaded()
        self._rollbacks, self._failed_at, self._streak, self._saved = self._rollbacks + 1, step, 0, found.step
        if self.process.leads:
            self.reporter.back_to(found.step)
        self._note("rollback", step, to=found.step, cause=what)
        _log.warning("%s: back to step %d", what, found.step)
        return found.step
