"""Write one shard of the plan: what a worker process does. It imports little, since every worker starts anew."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.quarantine import Rejected
from data_prep.samples import Sample, from_array, from_bytes
from data_prep.shard import EXTENSIONS, ShardFile, ShardWriter

MAX_FILE = 1 << 31
TICK = 16  # images between two reports of progress


@dataclass(frozen=True)
class Task:
    """What is the same for all shards.

    Attributes:
        kind: `files` under `root`, or `npz`: arrays `{split}_images.npy` under `root`.
        root: where the images are.
        folder: where the shards go.
        resize: the largest shorter side in pixels, or None.
        trust: read headers only where an image passes through.
        labels: the names of each label column.
    """

    kind: str
    root: Path
    folder: Path
    resize: int | None
    trust: bool
    labels: dict[str, list[str]]


@dataclass(frozen=True)
class Job:
    """One shard to write: the plan positions from `start`, one for each name.

    `labels` is (n, L) int32, `pseudonyms` (n,) int64 with 0 for an unknown patient; `measure` is how many of the first
    images count towards mean and standard deviation.
    """

    number: int
    split: str
    start: int
    names: list[str]
    labels: np.ndarray
    pseudonyms: np.ndarray
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
        flat = values.reshape(-1, 1 if values.ndim == 2 else values.shape[2]).astype(np.int64)
        self.merge(Tally(1, len(flat), flat.sum(axis=0).tolist(), np.einsum("nc,nc->c", flat, flat).tolist()))

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

    `rows` is (n, 8) int64: plan position, offset, length, extension (place in EXTENSIONS), width, height, bit depth,
    channels. `rejected` has plan position, reason code and message. `file` is None where no image was left.
    """

    number: int
    split: str
    path: Path
    file: ShardFile | None
    rows: np.ndarray
    rejected: list[tuple[int, str, str]]
    tallies: dict[int, Tally]


def key_of(position: int) -> str:
    """A sample's key: its place in the plan, which says nothing of its source."""
    return f"{position:09d}"


def pseudonym_of(number: int) -> str:
    return f"p{number:07d}"


def write_shard(task: Task, job: Job, tick: Callable[[int], None]) -> ShardResult:
    """Read, check and pack one job's images.

    Args:
        task: the settings.
        job: the images.
        tick: called with the number of images done since the last call; may raise to stop the work.
    """
    path = task.folder / f"plan-{job.number:06d}.tar"
    rows: list[tuple[int, ...]] = []
    rejected: list[tuple[int, str, str]] = []
    tallies = {1: Tally(), 3: Tally()}
    records = _Records(job.split, task.labels)
    measured = 0
    with ShardWriter(path) as writer:
        for i, name in enumerate(job.names):
            if i % TICK == 0 and i:
                tick(TICK)
            position = job.start + i
            try:
                sample = _load(task, name, measured < job.measure)
            except Rejected as reason:
                rejected.append((position, reason.code, reason.message))
                continue
            if sample.values is not None:
                tallies[sample.channels].add(sample.values)
                measured += 1
            record = records.dump(sample, int(job.pseudonyms[i]), job.labels[i])
            offset = writer.add(key_of(position), sample.extension, sample.data, record)
            extension = EXTENSIONS.index(sample.extension)
            rows.append((position, offset, len(sample.data), extension, *sample[2:6]))
        tick((len(job.names) - 1) % TICK + 1)
        file = writer.close() if rows else None
    table = np.array(rows, np.int64).reshape(len(rows), 8)
    return ShardResult(job.number, job.split, path, file, table, rejected, tallies)


def _load(task: Task, name: str, measure: bool) -> Sample:
    if task.kind == "npz":
        split, _, number = name.partition("/")
        return from_array(np.asarray(_array(task.root / f"{split}_images.npy")[int(number)]), task.resize, measure)
    try:
        with open(f"{task.root}/{name}", "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE:
                raise Rejected("too_large", "a file of more than 2 GiB")
            data = file.read()
    except OSError as error:
        raise Rejected("unreadable", os.strerror(error.errno or 0)) from None
    return from_bytes(data, task.resize, decode=not task.trust, measure=measure)


@functools.lru_cache(maxsize=8)
def _array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


class _Records:
    """The JSON of a sample, from parts that are dumped once for each combination of labels."""

    def __init__(self, split: str, labels: dict[str, list[str]]) -> None:
        self._split = json.dumps(split)
        self._labels = labels
        self._known: dict[bytes, str] = {}

    def dump(self, sample: Sample, pseudonym: int, ids: np.ndarray) -> bytes:
        key = ids.tobytes()
        labels = self._known.get(key)
        if labels is None:
            named = {
                name: names[place] if place >= 0 else None
                for (name, names), place in zip(self._labels.items(), ids.tolist(), strict=True)
            }
            labels = self._known[key] = json.dumps(named, separators=(",", ":"))
        patient = f'"{pseudonym_of(pseudonym)}"' if pseudonym else "null"
        return (
            f'{{"split":{self._split},"width":{sample.width},"height":{sample.height},'
            f'"bit_depth":{sample.bit_depth},"channels":{sample.channels},"patient":{patient},"labels":{labels}}}'
        ).encode()
