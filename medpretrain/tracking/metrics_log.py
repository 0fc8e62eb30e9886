"""What was measured, as JSON lines in the run folder: on local disk before anything else sees it.

A row is one JSON object on one line with `step` (a whole number that never falls from row to row) and `time` (seconds
since 1970). JSON has no NaN or infinity: they stand there as the strings "nan", "inf" and "-inf" and are read back as
floats.

Rows that a run drops as it goes back to a checkpoint are kept in `metrics.rolled_back.jsonl` beside it, each batch of
them followed by a line that ends the rollback. Nothing reads that file but those who sent such rows on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_prep.errors import UserError

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_log = logging.getLogger(__name__)

Row = dict[str, Any]
Position = tuple[int, int]
"""The step of a row, and which row of that step it is, from 1."""
Placed = tuple[Position, Row]


class MetricsLog:
    """Appends rows to a JSON-lines file; each is with the operating system when `append` returns.

    What cannot be written, the disk being full, waits in memory and is written, in order, by the next call that can. A
    line torn by a crash is cut off when the file is opened, with a warning.

    Args:
        path: the file, made if it is not there; one process writes it.

    Raises:
        UserError: the file holds a line that is no row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last_step = -1
        _end_interrupted_rollback(path)
        if path.exists():
            _cut_torn_line(path)
            self._last_step = max((row["step"] for row in read_metrics(path)), default=-1)
        self._waiting = bytearray()
        self._file = self._open()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row: `step` and any numbers, booleans, strings or None; `time` is filled in if it is missing.

        Raises:
            TypeError: a value of another type, a tensor for example.
            OSError: the disk is full or gone; the row waits.
        """
        step = row["step"]
        assert type(step) is int, f"step is {step!r}"
        assert step >= self._last_step, f"step {step} after step {self._last_step}: truncate_after comes first"
        self._waiting += _to_line({"step": step, "time": time.time()} | dict(row)).encode()
        self._last_step = step
        self._write_waiting()

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, as a run that goes back to `step` measures them again; all or nothing."""
        self._write_waiting()
        rows = read_metrics(self._path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) == len(rows):
            return
        # A row measured again must never be seen before the end of the rollback, which must not be before its rows.
        _append_durably(rolled_back_file(self._path), rows[len(kept) :])
        self._file.close()
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        temporary.unlink(missing_ok=True)
        _append_durably(temporary, kept)
        os.replace(temporary, self._path)
        _append_durably(rolled_back_file(self._path), [{"step": step, "rolled_back": True}])
        self._file = self._open()
        self._last_step = kept[-1]["step"] if kept else -1

    def sync(self) -> None:
        """Put the rows on disk: a checkpoint that follows is never ahead of them."""
        self._write_waiting()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put the rows on disk and close the file; a second call does nothing. Rows that still cannot be written are
        lost, and their number is logged: it must not hide how the run ended."""
        if self._file.closed:
            return
        try:
            self.sync()
        except OSError as error:
            lost = self._waiting.count(b"\n")
            _log.error("%s cannot be written (%s): its last %d rows are lost", self._path, error.strerror, lost)
        self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:  # a disk may take part of a line before it is full; the rest then follows it
            written = self._file.write(self._waiting)
            del self._waiting[:written]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> FileIO:
        return open(self._path, "ab", buffering=0)


class MetricsTail:
    """Reads the rows of a file that is still being written, and of one that `truncate_after` replaces meanwhile.

    Args:
        path: the file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._restart(-1)

    def _restart(self, inode: int) -> None:
        self._inode, self._offset, self._line = inode, 0, 0
        self._position: Position = (-1, 0)

    def read(self, limit: int) -> list[Placed]:
        """Up to `limit` rows that follow those read before, each with its position (step, nth row of that step).

        Positions grow along the file and are the same in every reading of it. After the file was replaced it is read
        from its start again: the caller passes over the positions it has dealt with.

        Raises:
            UserError: a line that is no row; its number is in the message.
            OSError: the file cannot be read.
        """
        rows: list[Placed] = []
        if not self._path.exists():
            return rows
        with open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._restart(status.st_ino)
            file.seek(self._offset)
            for line in file:
                if len(rows) == limit or not line.endswith(b"\n"):
                    break  # a line without its end is still being written
                row = _from_line(line, self._path, self._line + 1)
                self._position = _next_position(self._position, row)
                self._offset += len(line)
                self._line += 1
                rows.append((self._position, row))
        return rows


def read_metrics(path: Path) -> list[Row]:
    """All rows of the file; a last line that is not finished is left out.

    Raises:
        UserError: the file is not there, or holds a line that is no row; its number is in the message.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError as error:
        raise UserError(f"there are no metrics at {path}") from error
    return [_from_line(line, path, number) for number, line in enumerate(lines, 1)]


@dataclass(frozen=True)
class Rollback:
    """A rollback that is complete: the run went back to `kept_to` and dropped `rows`.

    `end` is where it ends in the file, in bytes.
    """

    kept_to: int
    rows: list[Placed]
    end: int


def rolled_back_file(metrics: Path) -> Path:
    """Where the rows are that were dropped from a metrics file."""
    return metrics.with_name(f"{metrics.stem}.rolled_back{metrics.suffix}")


def read_rollbacks(metrics: Path, start: int = 0) -> list[Rollback]:
    """The complete rollbacks of a metrics file, oldest first, from an `end` of one on.

    Raises:
        UserError: a line that is no row.
    """
    path = rolled_back_file(metrics)
    found: list[Rollback] = []
    if not path.exists() or path.stat().st_size <= start:
        return found
    with open(path, "rb") as file:
        file.seek(start)
        rows: list[Placed] = []
        position: Position = (-1, 0)
        end = start
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            row = _from_line(line, path, number)
            if row.get("rolled_back") is True:
                found.append(Rollback(row["step"], rows, end))
                rows, position = [], (-1, 0)
            else:
                # Those of an attempt that was cut off stand before the whole of it.
                position = _next_position(position if row["step"] >= position[0] else (-1, 0), row)
                rows.append((position, row))
    return found


def _next_position(last: Position, row: Row) -> Position:
    return row["step"], last[1] + 1 if row["step"] == last[0] else 1


def _append_durably(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(_to_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _end_interrupted_rollback(metrics: Path) -> None:
    """A crash may have come before a rollback's last line, and before or after the rows were dropped.

    Saying that it happened is right in both cases: rows that are still there are then sent again with the same times.
    """
    path = rolled_back_file(metrics)
    if not path.exists():
        return
    _cut_torn_line(path)
    whole = read_rollbacks(metrics)
    with open(path, "rb") as file:
        file.seek(whole[-1].end if whole else 0)
        open_steps = [_from_line(line, path, number)["step"] for number, line in enumerate(file, 1)]
    if open_steps:
        _append_durably(path, [{"step": min(open_steps) - 1, "rolled_back": True}])


def _to_line(row: Row) -> str:
    safe: Row = {}
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            raise TypeError(f"the metric {name!r} is a {type(value).__name__}; a row takes numbers, strings and None")
        safe[name] = value
    return json.dumps(safe, allow_nan=False) + "\n"


def _from_line(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: this is not JSON") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise UserError(f"{path}, line {number}: a row needs a whole number as its step")
    return {name: _NOT_FINITE.get(value, value) if type(value) is str else value for name, value in row.items()}


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        _log.warning("%s ends in a torn line of %d bytes from a killed run; it is dropped", path, len(data) - whole)
        os.truncate(path, whole)
