"""Trains and evaluates the runs of a sweep: each a process of its own, some at a time; what is done is not repeated."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError, WorkFailed
from launchers.on_host import LEAVE_S, noted_signals
from medpretrain.health.exits import Exit
from medpretrain.sweep.expand import SweepRun, words
from medpretrain.sweep.folder import Folder, PlannedRun
from medpretrain.sweep.sweep_file import Evaluate, Sweep

PROGRAM = (sys.executable, "-m", "medpretrain")
_LAUNCHERS = ("torchrun", "deepspeed")
_LAST_LINES = 4096


class SweepStopped(WorkFailed):
    """Asked to leave; the same command goes on."""

    exit_code = Exit.PREEMPTED


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        what: `train`, or the evaluation's words that do not depend on where things are.
    """

    what: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.command)


@dataclass(frozen=True)
class Work:
    """A run of a sweep, and its commands.

    Attributes:
        steps: the training, then the evaluations.
    """

    planned: PlannedRun
    steps: tuple[Step, ...]

    @classmethod
    def of(
        cls,
        sweep: Sweep,
        run: SweepRun,
        planned: PlannedRun,
        folder: Folder,
        launch: Sequence[str] = (),
        program: Sequence[str] | None = None,
    ) -> Work:
        """
        Args:
            launch: words after `medpretrain launch`, where each training is to be launched so.
            program: the words that start medpretrain, by default this one.

        Raises:
            UserError: the recipe names no dataset, or several and an evaluation none.
        """
        data, where = run.resolved.data.path, folder.run(run.name)
        if not data:
            raise UserError("the recipe names no dataset; give one, as in data.path=shards/bloodmnist")
        start = ["launch", *launch] if launch else ["train"]
        program = program or PROGRAM
        steps = [Step("train", (*program, *start, *words(run, where)))]
        for entry in sweep.evaluate:
            if len(data) > 1 and entry.dataset is None:
                raise UserError(
                    f"{len(data)} datasets are trained on; say in evaluate which dataset one is measured on"
                )
            command = entry.words(where, data[0], run.resolved.device)
            steps.append(Step(evaluation_name(entry), (*program, *command)))
        return cls(planned, tuple(steps))


def evaluation_name(entry: Evaluate) -> str:
    """What tells one evaluation of a sweep from another, wherever runs and data lie."""
    short = entry.words(Path("RUN"), "DATASET", "auto")
    return shlex.join(short[1:2] + short[3 if entry.dataset else 4 :])


def refuse_launch(launch: Sequence[str]) -> None:
    """Raises:
    UserError: a launcher that comes back before the training has ended.
    """
    if launch and launch[0] not in _LAUNCHERS:
        raise UserError(
            f"--launch {launch[0]}: it can be {' or '.join(_LAUNCHERS)}; in a queue start an array of jobs, each with "
            "--only and its number"
        )


@dataclass
class Outcome:
    """What became of the runs.

    Attributes:
        done: names of those whose every step is done, now or before.
        failed: of the others what ended them, by name.
        stopped: whether all were asked to leave.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def execute(
    works: Sequence[Work], folder: Folder, jobs: int = 1, say: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Take the missing steps of each run, `jobs` runs at a time.

    A run that fails does not end the others. A signal to leave is passed on to the processes under way, which may
    commit a checkpoint; a second Ctrl-C, or ten minutes, kills them.

    Args:
        say: told of each step as it begins and ends.
    """
    outcome = Outcome()
    waiting, active = list(works), dict[int, _Runner]()
    asked_at: float | None = None
    with noted_signals() as asked:
        try:
            while active or (waiting and not outcome.stopped):
                outcome.stopped = outcome.stopped or bool(asked)
                while waiting and len(active) < jobs and not outcome.stopped:
                    work = waiting.pop(0)
                    active[work.planned.number] = _Runner(work, folder, say)
                for number, runner in list(active.items()):
                    ended = runner.poll(outcome.stopped)
                    if ended is None:
                        continue
                    del active[number]
                    if ended == _STOPPED:
                        outcome.stopped = True
                    elif ended:
                        outcome.failed[runner.name] = ended
                    else:
                        outcome.done.append(runner.name)
                if (asked or outcome.stopped) and asked_at is None:
                    outcome.stopped, asked_at = True, time.monotonic()
                    say("asked to leave: waiting for what is under way to keep its state")
                    for runner in active.values():
                        runner.signal(signal.SIGTERM)
                if asked_at and (asked.count(signal.SIGINT) > 1 or time.monotonic() - asked_at > LEAVE_S):
                    for runner in active.values():
                        runner.signal(signal.SIGKILL)
                if active:
                    time.sleep(0.05)
        finally:
            for runner in active.values():  # of those only an error left some
                runner.signal(signal.SIGTERM)
    return outcome


_STOPPED = "stopped"


class _Runner:
    """One run's steps, one process after another."""

    def __init__(self, work: Work, folder: Folder, say: Callable[[str], None]) -> None:
        self.name = work.planned.name
        self._work, self._folder, self._say = work, folder, say
        self._process: subprocess.Popen[bytes] | None = None
        self._steps: Iterator[Step] = iter(self._missing())
        self._step: Step | None = None
        self._before: dict[str, int] = {}
        self._began = 0.0

    def poll(self, stopped: bool) -> str | None:
        """None while it goes on; then "" where all is done, or what ended it."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            self.signal(signal.SIGKILL)  # what it may have left in its group
            self._process = None
            assert self._step is not None
            if code == Exit.PREEMPTED or (code != 0 and stopped):
                return _STOPPED
            if code != 0:
                return f"{self._title(self._step)} ended with {code}: {self._last_line()}"
            problem = self._note(self._step)
            if problem:
                return problem
            self._say(f"{self.name}: {self._title(self._step)} done in {time.monotonic() - self._began:.0f} s")
        if stopped:
            return _STOPPED
        self._step = next(self._steps, None)
        if self._step is None:
            return ""
        self._start(self._step)
        return None

    def signal(self, number: int) -> None:
        """SIGTERM to the process, which passes it on if it has others; SIGKILL to all of its group."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _missing(self) -> list[Step]:
        done = self._folder.done(self._work.planned)
        if done is None:
            return list(self._work.steps)
        return [step for step in self._work.steps[1:] if step.what not in done.evaluations]

    def _start(self, step: Step) -> None:
        self._before, self._began = self._files(), time.monotonic()
        self._say(f"{self.name}: {self._title(step)} (log: {self._folder.log(self.name)})")
        with self._folder.log(self.name).open("ab") as log:
            log.write(f"$ {step}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                step.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _note(self, step: Step) -> str:
        """Keep that a step is done; what is wrong if it is not."""
        planned = self._work.planned
        if step.what == "train":
            self._folder.mark_trained(planned)
            return ""
        new = [name for name, changed in self._files().items() if self._before.get(name) != changed]
        if not new:
            return f"{self._title(step)} ended well and left no file in {self._folder.evaluations(self.name)}"
        self._folder.mark_evaluated(planned, step.what, new)
        return ""

    def _files(self) -> dict[str, int]:
        """The evaluations there are, and when each was written."""
        found = self._folder.evaluations(self.name).glob("*.evaluation.json")
        return {path.name: path.stat().st_mtime_ns for path in found}

    @staticmethod
    def _title(step: Step) -> str:
        return step.what if step.what == "train" else f"evaluate {step.what}"

    def _last_line(self) -> str:
        with self._folder.log(self.name).open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LAST_LINES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
