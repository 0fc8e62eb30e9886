"""Which rank is slow. In synchronous training all ranks take the same time a step, so each measures its own speed."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from medpretrain.health.heartbeat import Beat

_LEAST_DATA_WAIT = 0.05  # waiting less than a twentieth of the time is nobody's trouble
_IN_A_ROW = 6  # so that none of the five times of the first median is in the last


class Probe:
    """A small computation without collectives, timed on the device.

    On CPU six products of 256 x 256 (a few ms), on CUDA four of 2048 x 2048 between events that are read at the next
    probe, so that nothing waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        size = 2048 if self._cuda else 256
        self._a = torch.full((size, size), 0.5, device=device)  # not random: random numbers belong to the training
        self._out = torch.empty_like(self._a)
        self._times: deque[float] = deque(maxlen=5)
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.run()
        self._times.clear()  # the first pays for loading

    @property
    def median_s(self) -> float | None:
        return statistics.median(self._times) if len(self._times) >= 3 else None

    def run(self) -> None:
        """Take one time."""
        if not self._cuda:
            started = time.perf_counter()
            self._multiply(6)
            self._times.append(time.perf_counter() - started)
            return
        if self._events is not None and self._events[1].query():
            self._times.append(self._events[0].elapsed_time(self._events[1]) / 1000)
            self._events = None
        if self._events is None:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            self._multiply(4)
            last.record()
            self._events = first, last

    @torch.no_grad()
    def _multiply(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._a, self._a, out=self._out)


@dataclass(frozen=True)
class Slow:
    """A rank that is slower than the others."""

    beat: Beat
    why: Literal["computes", "data"]
    factor: float
    """Times as long as the median of the others."""

    def __str__(self) -> str:
        if self.why == "data":
            share = f"{self.beat.data_wait:.0%}".replace("%", " %")
            return f"{self.beat.who} waits for data {share} of the time, {self.factor:.1f} times as much as the others"
        return f"{self.beat.who} takes {self.factor:.1f} times as long as the others for the same computation"


class Comparison:
    """Names a rank when it was slow six times in a row; again only after it was not six times in a row.

    Args:
        slow: from this factor on, against the median of the other ranks.
    """

    def __init__(self, slow: float) -> None:
        self._slow = slow
        self._in_a_row: dict[tuple[int, str], int] = {}
        self._named: set[tuple[int, str]] = set()

    def update(self, beats: Mapping[int, Beat]) -> list[Slow]:
        """The ranks that are to be named now, of the newest beats of all."""
        named = []
        found: dict[tuple[int, str], Slow] = {(each.beat.rank, each.why): each for each in self._slow_now(beats)}
        # Counted is how often in a row a rank was not what it is known as.
        changed = [key for key in found.keys() | self._named if (key in found) != (key in self._named)]
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in changed}
        for key in [key for key, times in self._in_a_row.items() if times == _IN_A_ROW]:
            del self._in_a_row[key]
            self._named ^= {key}
            if key in found:
                named.append(found[key])
        return named

    def _slow_now(self, beats: Mapping[int, Beat]) -> list[Slow]:
        found = []
        for rank, beat in beats.items():
            others = [other for other_rank, other in beats.items() if other_rank != rank]
            probes = [other.probe_s for other in others if other.probe_s is not None]
            if beat.probe_s is not None and probes:
                factor = beat.probe_s / statistics.median(probes)
                if factor >= self._slow:
                    found.append(Slow(beat, "computes", factor))
            if others and beat.data_wait > _LEAST_DATA_WAIT:
                usual = max(statistics.median(other.data_wait for other in others), 1e-3)
                if beat.data_wait >= self._slow * usual:
                    found.append(Slow(beat, "data", beat.data_wait / usual))
        return found
