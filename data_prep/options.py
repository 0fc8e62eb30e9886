"""What a preparation is told: what decides the result, and how it goes about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

SHARD_SIZE = 2048
# Train images behind mean and standard deviation. The images are shuffled, so 16,384 tell both to about 0.001, and
# 1,024 to 0.003; where nothing else is decoded, each costs more.
MEASURED = 16_384
MEASURED_TRUSTED = 1024
DUPLICATES = ("off", "exact", "near")


@dataclass(frozen=True)
class Options:
    """What every kind of source knows.

    Attributes:
        split: fractions by split name, see `parse_split`.
        seed: of shuffle, split and, without a key, pseudonyms; 0 <= seed < 2**63. It is kept with the link table and
            not in the dataset: with the seed and a list of all patients, the order of pseudonyms could be worked out.
        shard_size: the most images in a shard.
        duplicates: what is looked for: `off`, `exact` (the same pixels) or `near` (about the same too).
        drop_duplicates: what is taken out: `off`; `exact`, one of each stays; `near`, look-alikes across splits too, of
            which many are different images.
    """

    split: Mapping[str, float] | None = None
    seed: int = 0
    shard_size: int = SHARD_SIZE
    duplicates: str = "near"
    drop_duplicates: str = "off"


@dataclass(frozen=True)
class Progress:
    """How far a run is: sources done of all, bytes written, images set aside."""

    what: str
    done: int
    total: int | None
    bytes: int = 0
    quarantined: int = 0


@dataclass(frozen=True)
class Running:
    """How a run goes about it; the result does not depend on any of it.

    Attributes:
        workers: processes, or items that `executor` has in hand at a time.
        executor: any of `concurrent.futures` shape instead of processes; its workers see source and OUT.
        cluster: address of a Dask scheduler, instead of processes.
        part: (i, n): do every n-th shard only, from the i-th, counted from 1; the part that ends last finishes.
        overwrite: replace a dataset in OUT, and forget an unfinished run.
        append: add to a dataset in OUT, with the options it was made with.
        private: where the link table goes; OUT.private by default.
        on_progress: called now and then.
    """

    workers: int = 1
    executor: Executor | None = None
    cluster: str | None = None
    part: tuple[int, int] | None = None
    overwrite: bool = False
    append: bool = False
    private: Path | None = None
    on_progress: Callable[[Progress], None] | None = None


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Read `--part i/n`.

    Raises:
        UserError: it is not of that form.

    >>> parse_part("3/8")
    (3, 8)
    """
    if text is None:
        return None
    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f"--part {text!r}: must be of the form i/n, from 1/n to n/n")
    return int(numbers[1]), int(numbers[2])
