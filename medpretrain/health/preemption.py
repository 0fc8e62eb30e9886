"""Leaving when asked: a signal to any rank lets all ranks commit and leave at the same step."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from data_prep.errors import WorkFailed
from medpretrain.health.exits import Exit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_MAX = dist.AllreduceOptions()
_MAX.reduceOp = dist.ReduceOp.MAX

_log = logging.getLogger(__name__)


class Preempted(WorkFailed):
    """The run was asked to leave; its checkpoint is committed."""

    exit_code = Exit.PREEMPTED


class Preemption:
    """Notes SIGTERM, SIGUSR1 and SIGINT, and lets all ranks agree on the step at which they leave.

    A signal sets a flag and nothing else. The largest flag of all ranks is asked for at one step boundary, without
    waiting, and read at the next: so no step waits, and a run leaves at most two steps after the signal. A second
    SIGINT (Ctrl-C) raises KeyboardInterrupt at once. The handlers of before are set again at exit, but for an exit with
    `Preempted`.

    Args:
        world: processes of the run. Above 1 the default process group must be there, and every rank must make this
            object, for it makes a gloo group of its own.
        timeout: of that group, for a rank that is lost; longer than the longest step.

    >>> import os, signal
    >>> with Preemption(world=1) as preemption:
    ...     before = preemption.agreed(1)
    ...     os.kill(os.getpid(), signal.SIGUSR1)
    ...     print(before, preemption.agreed(2))
    None SIGUSR1
    """

    def __init__(self, world: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        self._received = 0
        self._group: dist.ProcessGroup | None = None
        if world > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Preempted):
            return  # the process is about to end as it should, and the signal may come a second time
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._work is not None and kind is None:
            self._work.wait()  # every rank has asked as often, so it ends

    def agreed(self, step: int) -> str | None:
        """At a step boundary, on every rank: the signal for which all ranks leave at this step, or None.

        Args:
            step: steps done, for the log. Every rank must ask at every boundary.
        """
        found = self._received
        if self._group is not None:
            found = 0
            if self._work is not None:
                self._work.wait()
                found = int(self._flag)
            self._work = None
            if not found:
                self._flag.fill_(self._received)  # of several signals the largest number wins
                self._work = self._group.allreduce([self._flag], _MAX)
        if not found:
            return None
        name = signal.Signals(found).name
        _log.info("%s: all ranks leave at step %d", name, step)
        return name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


def end_with_parent() -> None:
    """Under torchrun: SIGTERM to this process when its agent dies, for an orphan would hold its GPUs for ever.

    Linux only; elsewhere nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
