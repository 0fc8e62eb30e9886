"""Samples that do not decode, and those that are seen in their place."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import Dataset
from data_prep.errors import WorkFailed
from medpretrain.data.mixture import Mixture

_log = logging.getLogger(__name__)

Decoder = Callable[[Sequence[NDArray[np.uint8]], NDArray[np.int32]], dict[int, str]]
"""Given encoded images and their sizes (n, 2): which of them do not decode, and why."""


def alike_after(place: int, labels_KN: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of all others with the same ids in each of K label kinds: those after `place`, then from the start.

    >>> alike_after(2, np.array([[0, 1, 0, 0, 1, 0], [7, 7, 7, 7, 7, 5]])).tolist()
    [3, 0]
    """
    alike = np.flatnonzero((labels_KN == labels_KN[:, place, None]).all(axis=0))
    return np.concatenate([alike[alike > place], alike[alike < place]])


def faults(dataset: Mixture | Dataset, rows: NDArray[np.int64], decoder: Decoder) -> dict[int, str]:
    """Which rows cannot be read or decoded, each tried by itself, and why, in one line.

    Raises:
        WorkFailed: a shard cannot be opened any more.
    """
    found: dict[int, str] = {}
    images: list[NDArray[np.uint8]] = []
    there: list[int] = []
    for row in np.unique(rows).tolist():
        try:
            images += dataset.read(np.array([row]))
            there.append(row)
        except OSError as error:
            found[row] = f"it cannot be read: {error.strerror or error}"
    for number, why in decoder(images, dataset.sizes[there]).items():
        found[there[number]] = why
    return found


class Replacements:
    """Which rows of a split are not seen, and which are instead.

    In the place of a row that does not decode stands the next one of the split, after the last the first again, that
    has the same labels and does decode. So it is a function of the data alone: every rank, and a run that is resumed on
    any number of them, comes to the same, and the labels of the global batch are what they were. What is remembered
    here only saves looking again.

    Args:
        rows_N: the rows of the split.
        labels_KN: their ids in each label kind that travels with a batch.
        limit: how many rows may turn out bad.
        listing: a file to which a JSON line for each is appended: its row, and the one in its place; the step, which
            a survey counts from 0; its dataset's number, shard and key; and what is wrong with it.
    """

    def __init__(
        self,
        dataset: Mixture,
        rows_N: NDArray[np.int64],
        labels_KN: NDArray[np.int64],
        decoder: Decoder,
        limit: int,
        listing: Path | None = None,
    ) -> None:
        self._dataset, self._rows, self._labels, self._decoder = dataset, rows_N, labels_KN, decoder
        self._limit, self._listing = limit, listing
        self._bad: dict[int, str] = {}
        self._instead: dict[int, int] = {}

    def __len__(self) -> int:
        """How many rows have turned out bad."""
        return len(self._bad)

    def seen(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that are seen for these, as far as is known."""
        if not self._instead:
            return rows
        return np.array([self._seen(row) for row in rows.tolist()], dtype=np.int64)

    def _seen(self, row: int) -> int:
        while row in self._instead:  # what stands for another may turn out bad later
            row = self._instead[row]
        return row

    def read(self, rows: NDArray[np.int64], step: int) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
        """The rows that are seen for these, and their encoded images.

        Raises:
            OSError: reading fails, though of no single image.
            WorkFailed: as `inspect`.
        """
        while True:
            seen = self.seen(rows)
            try:
                return seen, self._dataset.read(seen)
            except OSError:
                if not self.inspect(seen, step):
                    raise

    def inspect(self, rows: NDArray[np.int64], step: int) -> bool:
        """Try each of these rows by itself; True if any is bad, for which from now on another is seen.

        Raises:
            WorkFailed: more bad rows than the limit, no other row with the labels of one, or a shard that is gone.
        """
        untried = np.array([row for row in rows.tolist() if row not in self._bad], dtype=np.int64)
        bad = faults(self._dataset, untried, self._decoder)
        for row, why in bad.items():
            self._remember(row, why)
        for row in bad:
            self._replace(row, step)
        return any(row in self._bad for row in rows.tolist())

    def _replace(self, row: int, step: int) -> None:
        chain = [row]
        for other in self._rows[alike_after(int(np.searchsorted(self._rows, row)), self._labels)].tolist():
            if other in self._bad:
                continue
            why = faults(self._dataset, np.array([other]), self._decoder).get(other)
            if why is None:
                break
            self._remember(other, why)
            chain.append(other)
        else:
            raise WorkFailed(
                f"{self._named(row)} does not decode ({self._bad[row]}), and no other image with its labels does that "
                f"could be seen in its place; {self._advice([row])}"
            )
        for one in chain:
            self._instead[one] = other
            self._tell(one, other, step)

    def _remember(self, row: int, why: str) -> None:
        self._bad[row] = why
        if len(self._bad) <= self._limit:
            return
        shards = Counter(self._shard(one) for one in self._bad)
        shown = ", ".join(f"{shard} ({count})" for shard, count in shards.most_common(20))
        more = f" and {len(shards) - 20} more" if len(shards) > 20 else ""
        raise WorkFailed(
            f"more images do not decode than faults.replaced_samples={self._limit} of a process: they are in {shown}"
            f"{more}. The last is {self._named(row)} ({why}); {self._advice(self._bad)}"
        )

    def _tell(self, row: int, other: int, step: int) -> None:
        dataset, shard, key = self._dataset.sample_name(row)
        _log.warning(
            "step %d: %s does not decode (%s); row %d is seen in its place",
            *(step, self._named(row), self._bad[row], other),
        )
        if self._listing is None:
            return
        replaced = {"row": row, "replacement": other}
        if self._listing.exists() and json.dumps(replaced)[:-1] + "," in self._listing.read_text():
            return  # by this run before it was resumed, or by a survey
        where = {"step": step, "dataset": dataset, "shard": shard, "key": key}
        line = json.dumps(replaced | where | {"error": self._bad[row]}) + "\n"
        self._listing.parent.mkdir(parents=True, exist_ok=True)
        with self._listing.open("ab", buffering=0) as file:  # a line is written whole
            file.write(line.encode())

    def _shard(self, row: int) -> str:
        dataset, shard, _ = self._dataset.sample_name(row)
        return str(self._dataset.datasets[dataset].path / "shards" / shard)

    def _named(self, row: int) -> str:
        return f"image {self._dataset.sample_name(row)[2]} of {self._shard(row)}"

    def _advice(self, rows: Sequence[int] | dict[int, str]) -> str:
        numbers = sorted({self._dataset.sample_name(row)[0] for row in rows})
        commands = ", ".join(f"'medpretrain prep verify {self._dataset.datasets[number].path}'" for number in numbers)
        return f"{commands} finds all that are damaged"
