"""The table: a row for each thing that is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich.filesize import decimal

Status = Literal["pass", "warn", "fail", "not measured"]


@dataclass(frozen=True)
class Row:
    """What was found of one check, for all hosts or for some.

    Attributes:
        host: the names of those it is about, empty for all.
        advice: what to do; empty where nothing is to be done.
    """

    check: str
    status: Status
    figures: str
    host: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Limits:
    """From where on a row is a warning, or fails.

    Attributes:
        clock_warn_s, clock_fail_s: between a host's clock and the head's.
        link: part of the median of the links between other hosts, below which the best link of a host is slow.
        felt: part of a step's time that the gradients may take on a slow link before it is a failure.
        data: how many times the images of a step the data must give in a step's time.
        memory: part of the memory that may be in use.
        shared_memory: bytes of /dev/shm, for several GPUs on a host.
    """

    clock_warn_s: float = 1.0
    clock_fail_s: float = 60.0
    link: float = 0.5
    felt: float = 0.1
    data: float = 1.2
    memory: float = 0.9
    shared_memory: int = 1 << 30


Value = TypeVar("Value", bound=Hashable)


def usual(values: Sequence[Value]) -> Value:
    """The value that most have; of equally many the one that comes first, for the head stands first.

    >>> usual(["b", "a", "a"]), usual(["b", "a"])
    ('a', 'b')
    """
    return Counter(values).most_common(1)[0][0]


def others(values: Mapping[str, Value]) -> dict[Value, list[str]]:
    """The names that have another value than the usual one, by that value."""
    expected = usual(list(values.values()))
    found: dict[Value, list[str]] = {}
    for name, value in values.items():
        if value != expected:
            found.setdefault(value, []).append(name)
    return found


def listed(names: Iterable[str | int], most: int = 8) -> str:
    """
    >>> listed(range(12), most=3)
    '0, 1, 2 and 9 more'
    """
    given = [str(name) for name in names]
    more = f" and {len(given) - most} more" if len(given) > most else ""
    return ", ".join(given[:most]) + more


def in_bytes(count: float) -> str:
    """
    >>> in_bytes(1_234_567)
    '1.2 MB'
    """
    return decimal(int(count))


def in_time(seconds: float) -> str:
    """
    >>> in_time(0.0123), in_time(75), in_time(7300), in_time(400_000)
    ('12.3 ms', '75.0 s', '2.0 h', '4.6 days')
    """
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 600:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
