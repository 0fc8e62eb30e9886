"""Write one shard of the plan: what a worker does. It imports little, since every worker process starts anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from data_prep.dataset import LABEL_PREFIX, SHARDS, index_schema
from data_prep.quarantine import Rejected
from data_prep.samples import Sample
from data_prep.shard import ShardFile, ShardWriter
from data_prep.store import Store


class Picture(NamedTuple):
    """One image of a source, and what its record says beside the sample itself.

    `study`, `series` and `instance` are pseudonyms, `frame` counts from 0; `about` is JSON of allow-listed attributes.
    """

    sample: Sample
    study: str | None = None
    series: str | None = None
    instance: str | None = None
    frame: int | None = None
    about: Mapping[str, Any] | None = None


class Reader(Protocol):
    """Turns a source into pictures. Pickles, and holds no secret: a key is read where it is used."""

    def read(self, name: bytes, measure: bool) -> Iterable[Picture]:
        """The images of a source, one or (multi-frame) more.

        Args:
            name: as in the plan.
            measure: fill `Sample.values`.

        Raises:
            Rejected: the source cannot be used; its attribute `instance` may carry its pseudonym.
        """


@dataclass(frozen=True)
class Task:
    """What is the same for all shards: how to read, where to write, the names of each label column."""

    reader: Reader
    store: Store
    labels: dict[str, list[str]]


@dataclass(frozen=True)
class Job:
    """One shard to write: the plan positions from `start`, one for each name.

    `labels` is (n, L) int32; `patients` are pseudonyms; `measure` is how many of the first images count towards mean
    and standard deviation. Its repr shows no name: an engine may log what it failed at.
    """

    number: int
    shard: str
    split: str
    start: int
    names: list[bytes] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    patients: list[str | None] = field(repr=False)
    measure: int


@dataclass
class Tally:
    """Exact sums over the measured pixels of images with the same number of channels, so their order is no matter."""

    images: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        """Count the pixels of one image: (height, width) or (height, width, 3)."""
        planes = values.reshape(-1, 1 if values.ndim == 2 else values.shape[2]).T
        flat = np.ascontiguousarray(planes).astype(np.int64)  # a channel a row: about half the time
        self.merge(Tally(1, flat.shape[1], flat.sum(axis=1).tolist(), np.einsum("cn,cn->c", flat, flat).tolist()))

    def merge(self, other: Tally) -> None:
        """Add another tally's sums."""
        if other.images:
            self.images += other.images
            self.pixels += other.pixels
            zeros = [0] * len(other.sums)
            self.sums = [a + b for a, b in zip(self.sums or zeros, other.sums, strict=True)]
            self.squares = [a + b for a, b in zip(self.squares or zeros, other.squares, strict=True)]


@dataclass(frozen=True)
class ShardResult:
    """What became of a job.

    `rows` are its rows of index.parquet. `rejected` has plan position, reason code, message, and the pseudonyms of
    patient and instance. `file` is None where no image was left.
    """

    number: int
    sources: int
    file: ShardFile | None
    rows: pa.Table
    rejected: list[tuple[int, str, str, str | None, str | None]]
    tallies: dict[int, Tally]


def key_of(position: int, frame: int | None = None) -> str:
    """A sample's key: its place in the plan, which says nothing of its source, and its frame."""
    return f"{position:09d}" if frame is None else f"{position:09d}-{frame:05d}"


def write_shard(task: Task, job: Job) -> ShardResult:
    """Read, check and pack one job's images; the shard appears in the store when it is whole."""
    rows: list[tuple[Any, ...]] = []
    labels: list[np.ndarray] = []
    rejected: list[tuple[int, str, str, str | None, str | None]] = []
    tallies = {1: Tally(), 3: Tally()}
    records = _Records(job.split, task.labels)
    measured = 0
    with task.store.scratch() as scratch:
        with ShardWriter(scratch / job.shard) as writer:
            for position, name, patient, ids in zip(
                range(job.start, job.start + len(job.names)), job.names, job.patients, job.labels, strict=True
            ):
                try:
                    # All frames before the first is packed: a source goes in whole or not at all.
                    pictures = list(task.reader.read(name, measured < job.measure))
                except Rejected as reason:
                    rejected.append((position, reason.code, reason.message, patient, reason.instance))
                    continue
                for picture in pictures:
                    sample = picture.sample
                    if sample.values is not None:
                        tallies[sample.channels].add(sample.values)
                        measured += 1
                    key = key_of(position, picture.frame)
                    offset = writer.add(key, sample.extension, sample.data, records.dump(picture, patient, ids))
                    # The columns of `index_schema` in their order, but for shard, split and labels.
                    size = (sample.width, sample.height, sample.bit_depth, sample.channels)
                    mark = sample.fingerprint
                    rows.append((key, offset, len(sample.data), sample.extension, *size, patient, *picture[1:5], *mark))
                    labels.append(ids)
            file = writer.close() if rows else None
        if file is not None:
            for ending in (".idx", ".tar"):  # the tar last: what is there has its index
                path = (scratch / job.shard).with_suffix(ending)
                task.store.add(path, f"{SHARDS}/{path.name}")
    table = _table(job, rows, labels, list(task.labels))
    return ShardResult(job.number, len(job.names), file, table, rejected, tallies)


def _table(job: Job, rows: list[tuple[Any, ...]], labels: list[np.ndarray], names: list[str]) -> pa.Table:
    schema = index_schema(names)
    same = {"shard": job.shard, "split": job.split}
    plain = [field.name for field in schema if field.name not in same and not field.name.startswith(LABEL_PREFIX)]
    found = list(zip(*rows, strict=True)) or [()] * len(plain)
    columns: dict[str, Any] = dict(zip(plain, found, strict=True))
    columns |= {name: [value] * len(rows) for name, value in same.items()}
    ids = np.stack(labels) if labels else np.zeros((0, len(names)), np.int32)
    columns |= {LABEL_PREFIX + name: ids[:, place] for place, name in enumerate(names)}
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


class _Records:
    """The JSON of a sample, from parts that are dumped once for each combination of labels."""

    def __init__(self, split: str, labels: dict[str, list[str]]) -> None:
        self._split = json.dumps(split)
        self._labels = labels
        self._known: dict[bytes, str] = {}

    def dump(self, picture: Picture, patient: str | None, ids: np.ndarray) -> bytes:
        key = ids.tobytes()
        labels = self._known.get(key)
        if labels is None:
            named = {
                name: names[place] if place >= 0 else None
                for (name, names), place in zip(self._labels.items(), ids.tolist(), strict=True)
            }
            labels = self._known[key] = json.dumps(named, separators=(",", ":"))
        sample = picture.sample
        said = "null" if patient is None else f'"{patient}"'
        more = {
            name: value
            for name in ("study", "series", "instance", "frame", "about")
            if (value := getattr(picture, name)) is not None
        }
        rest = "," + json.dumps(more, separators=(",", ":"))[1:] if more else "}"
        return (
            f'{{"split":{self._split},"width":{sample.width},"height":{sample.height},'
            f'"bit_depth":{sample.bit_depth},"channels":{sample.channels},"patient":{said},"labels":{labels}{rest}'
        ).encode()
