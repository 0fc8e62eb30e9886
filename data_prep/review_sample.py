"""Which kept images a reviewer sees: a seeded random choice in which every kind of image has its turn."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.dataset import LABEL_PREFIX, SHARDS
from data_prep.dataset_info import DatasetInfo
from data_prep.errors import UserError
from data_prep.shard import BLOCK
from data_prep.store import Store, UrlStore

MOST_OF_SERIES = 3  # of one series and kind
MOST_SHARDS = 8  # that are fetched from an object store
_DRAWN = 8  # images whose records are looked at, for each one that is shown


@dataclass(frozen=True)
class Sampled:
    """The images chosen.

    Attributes:
        rows: (n,) int64, rows of the index.
        records: the JSON of each.
        files: the open shards' local files by name.
        index: the dataset's.
        kinds: how many kinds of image are among them, and how many the dataset has.
        shards: how many shards were fetched, and how many there are; None where none had to be.
        most: of one series and kind.
    """

    rows: np.ndarray
    records: list[dict[str, Any]]
    files: dict[str, Path]
    index: pa.Table
    kinds: tuple[int, int]
    shards: tuple[int, int] | None
    most: int = MOST_OF_SERIES

    def images(self) -> Iterator[bytes]:
        """The encoded image of each row."""
        for row in self.index.select(["shard", "offset", "length"]).take(pa.array(self.rows)).to_pylist():
            with self.files[row["shard"]].open("rb") as file:
                file.seek(row["offset"])
                yield file.read(row["length"])


def sampled(
    store: Store, info: DatasetInfo, index: pa.Table, count: int, seed: int, stack: contextlib.ExitStack
) -> Sampled:
    """Choose up to `count` images.

    Each combination of labels, format, channels and kind of window is taken in turn, and of one series at most three
    images of a kind. From an object store only a few shards are fetched, those that have the most kinds.

    Args:
        store: of the dataset.
        info: its dataset.json.
        index: all of its index.parquet.
        count: how many.
        seed: of the choice.
        stack: keeps fetched shards until it is closed.

    Raises:
        UserError: a shard is missing or damaged.
    """
    order = np.random.default_rng(seed).permutation(len(index))
    kinds = _joined([kinds_of(info, index)[0], *(_codes(index, name) for name in ("extension", "channels"))])
    shards = _codes(index, "shard")
    names = index.column("shard").cast(pa.string())
    fetched = None
    if isinstance(store, UrlStore):
        wanted = _covering(shards[order], kinds[order])
        order = order[np.isin(shards[order], wanted)]
        fetched = (len(wanted), len(info.shards))
    series = _series(index)
    drawn = order[_in_turn(kinds[order], series[order], count * _DRAWN, MOST_OF_SERIES * _DRAWN)]
    files: dict[str, Path] = {}
    sizes = {shard.name: shard.bytes for shard in info.shards}
    for name in sorted(set(names.take(pa.array(drawn)).to_pylist())):
        try:
            files[name] = stack.enter_context(store.local(f"{SHARDS}/{name}"))
            size = files[name].stat().st_size
        except FileNotFoundError:
            raise UserError(f"the shard {name} is missing (see 'medpretrain prep verify')") from None
        if size != sizes[name]:
            raise UserError(f"the shard {name} was changed since it was written (see 'medpretrain prep verify')")
    records = _records(index, drawn, files)
    windows = np.array([_window_kind(record) for record in records])
    by_window = _joined([kinds[drawn], np.unique(windows, return_inverse=True)[1]])
    chosen = _in_turn(by_window, series[drawn], count, MOST_OF_SERIES)
    rows = drawn[chosen]
    seen = (len(np.unique(kinds[rows])), len(np.unique(kinds)))
    return Sampled(rows, [records[place] for place in chosen.tolist()], files, index, seen, fetched)


def kinds_of(info: DatasetInfo, index: pa.Table) -> tuple[np.ndarray, list[str]]:
    """(N,) int64, each image's kind by its labels, and what each kind is called.

    Modality and anatomy make the kind where the dataset has them, else all labels do.
    """
    names: list[str] = [name for name in ("modality", "anatomy") if name in info.labels]
    names = names or sorted(info.labels)
    if not names:
        return np.zeros(len(index), np.int64), ["all images"]
    columns = [index.column(LABEL_PREFIX + name).to_numpy() for name in names]
    kinds = _joined([column.astype(np.int64) + 1 for column in columns])
    _, first = np.unique(kinds, return_index=True)
    titles = []
    for row in first.tolist():
        values = [info.labels[name].names[column[row]] if column[row] >= 0 else None
                  for name, column in zip(names, columns, strict=True)]  # fmt: skip
        titles.append(", ".join(f"{name} {value or 'unknown'}" for name, value in zip(names, values, strict=True)))
    return kinds, titles


def _codes(index: pa.Table, column: str) -> np.ndarray:
    """(N,) int64: equal values have equal numbers, from 0; null has one too."""
    found = index.column(column)
    if pa.types.is_dictionary(found.type):
        found = found.cast(found.type.value_type)
    encoded = pc.dictionary_encode(found).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        return np.zeros(0, np.int64)
    return encoded.indices.fill_null(-1).to_numpy().astype(np.int64) + 1


def _joined(columns: list[np.ndarray]) -> np.ndarray:
    """(N,) int64: equal rows have equal numbers, from 0 in the order of their values."""
    joined = columns[0]
    for column in columns[1:]:
        joined = joined * (int(column.max(initial=0)) + 1) + column
        joined = np.unique(joined, return_inverse=True)[1].reshape(-1)
    return np.unique(joined, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _series(index: pa.Table) -> np.ndarray:
    """(N,) int64: the series, or where there is none the image itself."""
    series = _codes(index, "series")
    alone = index.column("series").is_null().to_numpy()
    return np.where(alone, np.arange(len(index)) + len(index) + 1, series)


def _ranks(groups: np.ndarray) -> np.ndarray:
    """(N,) int64: how many of its group stand before each."""
    order = np.argsort(groups, kind="stable")
    first = np.r_[True, groups[order][1:] != groups[order][:-1]][: len(groups)]
    places = np.arange(len(groups))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return ranks


def _in_turn(kinds: np.ndarray, series: np.ndarray, count: int, most: int) -> np.ndarray:
    """Up to `count` places: the first of each kind, then the second of each; at most `most` of a series and kind."""
    places = np.flatnonzero(_ranks(_joined([kinds, np.unique(series, return_inverse=True)[1]])) < most)
    return places[np.argsort(_ranks(kinds[places]), kind="stable")[:count]]


def _covering(shards: np.ndarray, kinds: np.ndarray) -> list[int]:
    """Few shards that have many kinds, each the one with the most that are missing still."""
    pairs = np.unique(np.stack([shards, kinds]), axis=1)
    inside = {shard: set(pairs[1, pairs[0] == shard].tolist()) for shard in np.unique(pairs[0]).tolist()}
    wanted: list[int] = []
    missing = set(pairs[1].tolist())
    while missing and len(wanted) < MOST_SHARDS:
        best = max(inside, key=lambda shard: (len(inside[shard] & missing), -shard))
        wanted.append(best)
        missing -= inside.pop(best)
    return wanted


def _records(index: pa.Table, rows: np.ndarray, files: dict[str, Path]) -> list[dict[str, Any]]:
    """The JSON that stands behind each image in its shard."""
    found: list[dict[str, Any]] = [{}] * len(rows)
    places: dict[str, list[int]] = {}
    table = index.select(["key", "shard", "offset", "length"]).take(pa.array(rows)).to_pylist()
    for place, row in enumerate(table):
        places.setdefault(row["shard"], []).append(place)
    for shard, inside in places.items():
        with files[shard].open("rb") as file:
            for place in sorted(inside, key=lambda place: table[place]["offset"]):
                row = table[place]
                file.seek(row["offset"] + row["length"] + -row["length"] % BLOCK)
                header = file.read(BLOCK)
                try:
                    if header[:100].rstrip(b"\0") != f"{row['key']}.json".encode():
                        raise ValueError
                    found[place] = json.loads(file.read(int(header[124:135], 8)))
                except ValueError:
                    raise UserError(f"the shard {shard} is damaged (see 'medpretrain prep verify')") from None
    return found


def _window_kind(record: dict[str, Any]) -> str:
    """What chose black and white: `stored`, `stored:lut`, `fixed`, ..."""
    window = str(record.get("about", {}).get("Window", ""))
    return window if window == "stored:lut" else window.partition(":")[0]
