"""The rows of a metrics file that a destination does not have yet, also when the run goes back and measures again."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from medpretrain.tracking.metrics_log import MetricsTail, Placed, Position, Row, read_rollbacks

_ROWS_A_READ = 500
START: Position = (-1, 0)


class Point(NamedTuple):
    """One number of a row, as a tracking server keeps it."""

    name: str
    value: float
    time_ms: int
    step: int


class Follower:
    """Reads on from a position; a rollback moves the position back, so that rows measured again are read again.

    A point that was rolled back and measured again with the same value has the time of its first measurement: to a
    store that keeps equal points once, it is then the same point, whether or not the first one had arrived.

    Args:
        metrics: the metrics file; it may not be there yet.
        position: of the last row dealt with.
        rollbacks_read: bytes of the file of rollbacks that `position` takes into account.
        since: bytes of it from before the destination had any row.
    """

    def __init__(self, metrics: Path, position: Position = START, rollbacks_read: int = 0, since: int = 0) -> None:
        self.position = position
        self.rollbacks_read = rollbacks_read
        self.rewound_to: int | None = None
        """The earliest step that a rollback kept; the destination sets it to None once it has dealt with that."""
        self._metrics = metrics
        self._tail = MetricsTail(metrics)
        self._waiting: list[Placed] = []
        self._first_times: dict[tuple[Position, str, str], int] = {}
        for rollback in read_rollbacks(metrics, since):
            if rollback.end <= rollbacks_read:
                self._remember(rollback.rows)

    def rows(self) -> list[Placed]:
        """The next rows behind `position`, the same ones until it is moved; none at the end of the file.

        Raises:
            UserError: a line that is no row.
            OSError: the file cannot be read.
        """
        while True:
            waiting = [placed for placed in self._waiting if placed[0] > self.position]
            read = [] if waiting else self._tail.read(_ROWS_A_READ)
            # Asked after reading: a row that was measured again is never handed out before its rollback is known.
            if self._went_back():
                self._tail, self._waiting = MetricsTail(self._metrics), []
                continue
            self._waiting = waiting or [placed for placed in read if placed[0] > self.position]
            if self._waiting or not read:
                return self._waiting

    def points(self, placed: Placed) -> list[Point]:
        """The numbers of a row."""
        position, row = placed
        time_ms = _time_ms(row)
        return [
            Point(name, value, self._first_times.get((position, name, repr(value)), time_ms), row["step"])
            for name, value in numbers(row)
        ]

    def _went_back(self) -> bool:
        rollbacks = read_rollbacks(self._metrics, self.rollbacks_read)
        for rollback in rollbacks:
            self._remember(rollback.rows)
            self.position = min(self.position, (rollback.kept_to + 1, 0))
            self.rewound_to = rollback.kept_to if self.rewound_to is None else min(self.rewound_to, rollback.kept_to)
            self.rollbacks_read = rollback.end
        return bool(rollbacks)

    def _remember(self, rows: list[Placed]) -> None:
        for position, row in rows:
            for name, value in numbers(row):
                self._first_times.setdefault((position, name, repr(value)), _time_ms(row))


def numbers(row: Row) -> list[tuple[str, float]]:
    """What of a row can be drawn.

    >>> numbers({"step": 3, "time": 1.7e9, "loss": 2, "phase": "warm-up", "collapsed": False})
    [('loss', 2.0), ('collapsed', 0.0)]
    """
    return [
        (name, float(value))
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, (int, float))
    ]


def _time_ms(row: Row) -> int:
    return int(row.get("time", 0) * 1000)
