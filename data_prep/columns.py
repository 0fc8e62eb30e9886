"""Long columns of a source, built from a stream without a Python object a row staying in memory."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from data_prep.labels import UNKNOWN, LabelColumn

CHUNK = 1 << 16


def names_column(names: Iterable[str | bytes]) -> pa.LargeBinaryArray:
    """File names as bytes; a name that is no UTF-8 stays what it is on disk.

    >>> names_column(["a.png", b"b.png"]).to_pylist()
    [b'a.png', b'b.png']
    """
    chunks: list[pa.Array] = []
    waiting: list[bytes] = []
    for name in names:
        waiting.append(os.fsencode(name))
        if len(waiting) == CHUNK:
            chunks.append(pa.array(waiting, pa.large_binary()))
            waiting = []
    chunks.append(pa.array(waiting, pa.large_binary()))
    return pa.concat_arrays(chunks)


def values(column: pa.Array) -> Iterator[bytes]:
    """The values of a long column one after another."""
    for start in range(0, len(column), CHUNK):
        yield from column[start : start + CHUNK].to_pylist()


class Words:
    """Text that repeats, as a dictionary and ids: `add` each value (None: unknown), then ask for a column."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._ids = array("i")

    def add(self, value: str | None) -> None:
        self._ids.append(UNKNOWN if value is None else self._places.setdefault(value, len(self._places)))

    def extend(self, stream: Iterable[str | None]) -> Words:
        for value in stream:
            self.add(value)
        return self

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, value: str) -> bool:
        return value in self._places

    @property
    def any(self) -> bool:
        return bool(self._places)

    def column(self) -> pa.DictionaryArray:
        """As Arrow, null where unknown; the words in the order in which they came first."""
        ids = np.frombuffer(self._ids, np.int32) if self._ids else np.zeros(0, np.int32)
        indices = pa.array(ids, mask=ids < 0)
        return pa.DictionaryArray.from_arrays(indices, pa.array(list(self._places), pa.string()))

    def labels(self, source: str) -> LabelColumn:
        """As a label with its own vocabulary, in order: as numbers where all are whole numbers, else as text."""
        names = vocabulary_order(set(self._places))
        return self.ids_in(names, source)

    def ids_in(self, names: list[str], source: str) -> LabelColumn:
        """As a label with the vocabulary `names`, which has every word."""
        place = {name: number for number, name in enumerate(names)}
        table = np.array([place[word] for word in self._places] + [UNKNOWN], np.int32)  # -1 finds the last
        ids = np.frombuffer(self._ids, np.int32) if self._ids else np.zeros(0, np.int32)
        return LabelColumn(names, table[ids], source)


def vocabulary_order(words: set[str]) -> list[str]:
    """Class names in order: as numbers where all are whole numbers, else as text.

    >>> vocabulary_order({"10", "9"}), vocabulary_order({"10", "9", "x"})
    (['9', '10'], ['10', '9', 'x'])
    """
    if all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in words):
        return sorted(words, key=lambda word: (int(word), word))
    return sorted(words)
