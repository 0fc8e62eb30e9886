"""What each rank says of itself about once a second, and how it reaches the others: through the group's c10d store."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

_FRAMES = 10
_THREADS = 16
_LEAVING_ROUND_S = 0.02
_generation = itertools.count()  # alike on all ranks, which make their objects in the same order


@dataclass(frozen=True)
class Beat:
    """One rank's word."""

    number: int
    """Grows by one; one that stands still is a process that does."""
    rank: int
    host: str
    place: str
    """Host and PID namespace: where these are one's own, /proc can be asked about `pid`."""
    pid: int
    born: str
    """Start of the process in clock ticks, so that a PID used again is not taken for it."""
    step: int = 0
    phase: str = "start"
    idle_s: float = 0.0
    """Since the main thread last got on."""
    stack: tuple[str, ...] = ()
    """Of the main thread, innermost frame last."""
    threads: tuple[str, ...] = ()
    probe_s: float | None = None
    """How long a fixed computation takes here."""
    data_wait: float = 0.0
    """Share of the time, 0 to 1."""
    left: str = ""
    """How it left the run, once it has."""

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.phase}" + (f", in {self.stack[-1]}" if self.stack else "")

    @classmethod
    def of_this_process(cls, rank: int) -> Beat:
        host, pid = socket.gethostname(), os.getpid()
        found = _stat(pid)
        return cls(0, rank, host, _place(host), pid, found[1] if found else "")

    @classmethod
    def from_json(cls, text: bytes) -> Beat:
        row: dict[str, Any] = json.loads(text)
        return cls(**row | {"stack": tuple(row["stack"]), "threads": tuple(row["threads"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def process_state(self) -> str | None:
        """What the operating system finds wrong with it: stopped, gone, ...; None where it is of another host."""
        if sys.platform != "linux" or self.place != _place(socket.gethostname()):
            return None
        found = _stat(self.pid)
        if found is None or found[1] != self.born:
            return "gone"
        states = {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "dead", "X": "dead"}
        return states.get(found[0], "")


def _place(host: str) -> str:
    try:
        return f"{host}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return host


def _stat(pid: int) -> tuple[str, str] | None:
    """State and start time of a process, from /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def stack_of(thread: int | None) -> tuple[str, ...]:
    """Where a thread is, innermost frame last, without reading source files: their disk may be what hangs."""
    frame = sys._current_frames().get(thread or -1)
    found: list[str] = []
    while frame is not None and len(found) < _FRAMES:
        code = frame.f_code
        found.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(reversed(found))


def thread_names() -> tuple[str, ...]:
    return tuple(thread.name for thread in threading.enumerate()[:_THREADS])


@dataclass(frozen=True)
class Seen:
    """A rank's newest beat, and for how long none newer has come although the store answered."""

    beat: Beat
    silent_s: float


class Courier:
    """Carries beats to and from the store in a thread of its own, for a call to a store that is stopped never returns.

    Args:
        own: this rank's first beat.
        interval_s: between two rounds.
        spread_s: at most so old is what is known of the others while nothing is suspected. Reading everything on every
            rank in every round would be world^2 values.
    """

    def __init__(self, own: Beat, world: int, interval_s: float, spread_s: float) -> None:
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own: calls on one connection wait for each other, and the main thread's may wait for long.
        self._store = dist.PrefixStore(f"health/{next(_generation)}", store.clone())  # type: ignore[attr-defined]
        self._world, self._interval_s, self._spread_s = world, interval_s, spread_s
        self.outbox = own
        self.suspicious = threading.Event()
        self.verdict: str | None = None
        """What a rank has concluded; the first one holds."""
        self._verdict_out: str | None = None
        self._lock = threading.Lock()
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._answered = self._read = time.monotonic()
        self._round, self._wake = threading.Event(), threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="heartbeat", daemon=True)
        self._thread.start()

    def seen(self) -> dict[int, Seen]:
        with self._lock:
            return {rank: Seen(beat, self._read - since) for rank, (beat, since) in self._beats.items()}

    def unanswered_s(self) -> float:
        """For how long the store has not answered."""
        return time.monotonic() - self._answered

    def forgive(self) -> None:
        """This very process stood still: what seemed silence was its own."""
        now = time.monotonic()
        with self._lock:
            self._answered = self._read = now
            self._beats = {rank: (beat, now) for rank, (beat, _) in self._beats.items()}

    def post(self, beat: Beat) -> None:
        """To be sent now, and what others have said read."""
        self.outbox = beat
        self._wake.set()

    def publish_verdict(self, text: str) -> None:
        self._verdict_out = text
        self._wake.set()

    def close(self, left: str, *, patience_s: float) -> None:
        """Say goodbye; rank 0, whose process may hold the store, waits a while for the others' goodbyes."""
        deadline = time.monotonic() + patience_s
        self.suspicious.set()
        self.post(replace(self.outbox, number=self.outbox.number + 1, left=left))
        others = self._world - 1 if self.outbox.rank == 0 else 0
        while time.monotonic() < deadline and self._thread.is_alive():
            if self._round.wait(0.02) and sum(bool(seen.beat.left) for seen in self.seen().values()) >= others:
                break
        self._stop.set()
        self._wake.set()
        self._thread.join(self._interval_s)  # a store that does not answer keeps it, and it ends with the process

    def _carry(self) -> None:
        while not self._stop.is_set():
            try:
                posted = self.outbox
                self._store.set(f"beat/{posted.rank}", posted.to_json())
                if self._verdict_out is not None and self.verdict is None:
                    # Whoever comes first; the others say the same.
                    self.verdict = self._store.compare_set("verdict", "", self._verdict_out).decode()
                elif self._store.check(["verdict"]):
                    self.verdict = self._store.get("verdict").decode()
                self._answered = time.monotonic()
                if self._wants_to_read():
                    self._read_all()
                if posted.left:
                    self._round.set()
            except RuntimeError:  # all that c10d raises
                return  # a lost connection does not come back: `unanswered_s` grows, and the watchdog says so
            self._wake.wait(_LEAVING_ROUND_S if self.outbox.left else self._interval_s)
            self._wake.clear()

    def _wants_to_read(self) -> bool:
        stale = time.monotonic() - self._read >= min(self._spread_s, self._interval_s * self._world / 16)
        return stale or self.suspicious.is_set() or len(self._beats) < self._world - 1

    def _read_all(self) -> None:
        ranks = [rank for rank in range(self._world) if rank != self.outbox.rank]
        there = [rank for rank in ranks if rank in self._beats or self._store.check([f"beat/{rank}"])]
        beats = [Beat.from_json(text) for text in self._store.multi_get([f"beat/{rank}" for rank in there])]
        now = time.monotonic()
        with self._lock:
            for beat in beats:
                known = self._beats.get(beat.rank)
                if known is None or known[0].number != beat.number:
                    self._beats[beat.rank] = (beat, now)
            self._read = now
