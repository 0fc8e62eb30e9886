"""Ends a run that hangs, names the rank that holds it up, and names a rank that is slow."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from medpretrain.health import last_words
from medpretrain.health.exits import Exit
from medpretrain.health.flight_recorder import dump_flight_recorder
from medpretrain.health.heartbeat import Beat, Courier, stack_of, thread_names
from medpretrain.health.speed import Comparison, Probe
from medpretrain.health.verdict import Phase, Verdict, judge

if TYPE_CHECKING:
    from medpretrain.training.process import Process

_FIRST_STEP = 10  # times as long, for compilation
_CALLBACK_S = 5.0
_GOODBYE_S = 3.0

_log = logging.getLogger(__name__)

Event = dict[str, Any]


class Watchdog:
    """A thread in each rank that watches the main thread and, by heartbeats, the other ranks.

    Made and entered by the main thread of every rank once the process group exists. The main thread calls `mark`
    wherever it gets on. When it has not for `hang_s` seconds (ten times as long until the first step is done), or a
    peer has been silent for so long while it has not got on itself, this rank says who holds up the run as its last
    line and ends its process with exit code 77: the main thread is stuck in a collective and cannot be asked. Every
    rank comes to that by itself, also when the process that holds the store is the one that stands still. A process
    that was stopped for a while, and its peers with it (a suspended job), goes on.

    Args:
        hang_s: seconds without progress.
        slow: a rank that takes this many times as long as the median of the others is named.
        on_event: told, in a thread of its own, what is to be kept: `{"event": "hang" | "slow" | "store", "rank",
            "time", "step", "cause", ...}`; a hang, on every rank, has `culprits` (what was last heard of each, with
            its stack) and `stacks` (of all threads here); slow ranks are named on rank 0.
        probe_s: seconds between two measurements of speed.
    """

    def __init__(
        self,
        process: Process,
        *,
        hang_s: float,
        slow: float,
        on_event: Callable[[Event], None],
        probe_s: float = 10.0,
    ) -> None:
        self._world, self._rank, self._device = process.world, process.rank, process.device
        self._hang_s, self._slow, self._on_event, self._probe_s = hang_s, slow, on_event, probe_s
        self._interval_s = min(1.0, hang_s / 5, probe_s)
        self._main = threading.get_ident()
        self._first_step: int | None = None
        self._at: tuple[int, Phase, float] = (0, "start", time.monotonic())
        self._allowed_s = _FIRST_STEP * hang_s
        self._waited = 0.0
        self._waits: deque[tuple[float, float]] = deque(maxlen=max(2, round(probe_s / self._interval_s)))
        self._probe: Probe | None = None
        self._next_probe = 0.0
        self._comparison = Comparison(slow)
        self._courier: Courier | None = None
        self._stop, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._own = replace(Beat.of_this_process(self._rank), stack=stack_of(self._main))
        if self._world > 1:
            self._courier = Courier(self._own, self._world, self._interval_s, spread_s=self._hang_s / 5)
        self._at = (*self._at[:2], time.monotonic())
        self._next_probe = time.monotonic() + self._probe_s
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ending.is_set():
            self._thread.join()  # it ends the process; an error of now is a consequence of another rank's end
        self._stop.set()
        self._thread.join()
        if self._courier is not None:
            patience_s = min(_GOODBYE_S, self._hang_s) if kind is None else self._interval_s
            self._courier.close("done" if kind is None else kind.__name__, patience_s=patience_s)

    def mark(self, step: int, phase: Phase) -> None:
        """The main thread got on: it has done `step` steps and begins `phase`. Costs well below a microsecond.

        Call it several times a step, and again and again in what takes long: each batch of a survey, each look at a
        save that is waited for.
        """
        now = time.monotonic()
        self._at = (step, phase, now)
        if phase == "step":
            if self._first_step is None:
                self._first_step = step
            elif step != self._first_step:
                self._allowed_s = self._hang_s
            if now >= self._next_probe:
                self._measure(now)

    def waited_for_data(self, seconds: float) -> None:
        """The main thread has waited so long for a batch."""
        self._waited += seconds

    def _measure(self, now: float) -> None:
        if self._probe is None:
            self._probe = Probe(self._device)
        else:
            self._probe.run()
        self._next_probe = now + self._probe_s

    def _watch(self) -> None:
        woken = compared = time.monotonic()
        told_of_store = False
        while not self._stop.wait(self._interval_s):
            now = time.monotonic()
            if now - woken > self._hang_s / 2:
                self._forgive(now)
            woken = now
            beat = self._own = self._beat(now)
            if self._courier is None:
                if beat.idle_s >= self._allowed_s:
                    self._end(judge(beat, {}, 1, silent_s=self._hang_s, unanswered_s=0.0))
                continue
            self._courier.post(beat)
            if beat.idle_s >= self._hang_s / 4:
                self._courier.suspicious.set()
            else:
                self._courier.suspicious.clear()
            if self._courier.verdict is not None:
                self._end(Verdict(self._courier.verdict))
            unanswered_s = self._courier.unanswered_s()
            if self._stuck(beat, unanswered_s):
                seen = self._courier.seen()
                half = self._hang_s / 2
                self._end(judge(beat, seen, self._world, silent_s=half, unanswered_s=unanswered_s))
            if unanswered_s >= self._hang_s and not told_of_store:
                told_of_store = True
                self._tell("store", f"rank {self._rank} has lost the store: a hang would be ended, not explained")
            if self._rank == 0 and now - compared >= self._probe_s:
                compared = now
                self._compare(beat)

    def _beat(self, now: float) -> Beat:
        step, phase, since = self._at
        self._waits.append((now, self._waited))
        (first, waited_then), (last, waited) = self._waits[0], self._waits[-1]
        return replace(
            self._own,
            number=self._own.number + 1,
            step=step,
            phase=phase,
            idle_s=round(now - since, 1),
            stack=stack_of(self._main),
            threads=thread_names(),
            probe_s=self._probe.median_s if self._probe is not None else None,
            data_wait=round((waited - waited_then) / (last - first), 4) if last > first else 0.0,
        )

    def _stuck(self, beat: Beat, unanswered_s: float) -> bool:
        """No progress for too long, or less long with a peer or the store silent. A run that gets on is never ended."""
        assert self._courier is not None
        if beat.idle_s >= self._allowed_s:
            return True
        if beat.idle_s < self._hang_s / 2:
            return False
        silent = any(each.silent_s >= self._hang_s and not each.beat.left for each in self._courier.seen().values())
        return silent or unanswered_s >= self._hang_s

    def _forgive(self, now: float) -> None:
        """This thread stood still: the process was stopped, or the host slept, and the peers perhaps too."""
        step, phase, _ = self._at
        self._at = (step, phase, now)
        if self._courier is not None:
            self._courier.forgive()

    def _compare(self, beat: Beat) -> None:
        assert self._courier is not None
        beats = {rank: each.beat for rank, each in self._courier.seen().items()} | {self._rank: beat}
        for slow in self._comparison.update(beats):
            about = slow.beat
            self._tell(
                "slow", str(slow), slow_rank=about.rank, host=about.host, why=slow.why, factor=round(slow.factor, 2)
            )

    def _tell(self, event: str, cause: str, **more: Any) -> None:
        if event != "hang":
            _log.warning("%s", cause)
        told = {"event": event, "rank": self._rank, "time": time.time(), "step": self._at[0], "cause": cause, **more}
        _within(_CALLBACK_S, lambda: self._on_event(told))

    def _end(self, verdict: Verdict) -> NoReturn:
        self._ending.set()
        speaks = self._speaks()
        if self._courier is not None and self._courier.verdict is None:
            self._courier.publish_verdict(verdict.cause)
        stacks = {name: stack_of(ident) for name, ident in ((each.name, each.ident) for each in threading.enumerate())}
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        culprits = [asdict(beat) for beat in verdict.culprits]
        self._tell("hang", verdict.cause, culprits=culprits, stacks=stacks)
        _within(_CALLBACK_S, lambda: dump_flight_recorder(self._rank))
        # The others come to their verdicts meanwhile; the first end would give them an error to stumble over.
        time.sleep(2 * self._interval_s + 0.5)
        if speaks:
            if sys.stderr.isatty():
                print("\x1b[?25h", file=sys.stderr)  # a progress bar hides the cursor
            last_words.say(last_words.Cause(verdict.cause, Exit.HANG))
        else:
            time.sleep(0.5)  # torchrun ends all when it sees one end, so the speaker comes first
        os._exit(Exit.HANG)

    def _speaks(self) -> bool:
        """One rank a host says it: the first that is alive."""
        if self._courier is None:
            return True
        near = [each.beat for each in self._courier.seen().values() if each.beat.place == self._own.place]
        return all(beat.rank > self._rank or beat.process_state() or beat.left for beat in near)


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Call in a thread and do not wait longer: the run folder's disk may be what hangs."""
    thread = threading.Thread(target=call, name="event", daemon=True)
    thread.start()
    thread.join(seconds)
