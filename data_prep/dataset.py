"""The format of a prepared dataset, writer and reader side by side.

    OUT/
      dataset.json          what it is: counts, label vocabularies, mean and std, a SHA-256 of every other file
      index.parquet         a row a sample, in the order of the shards: where its image lies, and what is known of it
      quarantine.parquet    a row an image that was left out: its number in the source, and why
      shards/
        train-00000.tar     plain WebDataset: KEY.jpg or KEY.png, then KEY.json
        train-00000.idx     DALI's index of it

Nothing in it says when or where it was made: the same images and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError, nearest
from data_prep.labels import LabelColumn

FORMAT = 1
INFO, INDEX, QUARANTINE, SHARDS = "dataset.json", "index.parquet", "quarantine.parquet", "shards"
TOOL = "medpretrain"
LABEL_PREFIX = "label."

_WORD = pa.dictionary(pa.int32(), pa.string())
_INDEX_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", _WORD, nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("length", pa.int64(), nullable=False),
    pa.field("extension", _WORD, nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("bit_depth", pa.int8(), nullable=False),
    pa.field("channels", pa.int8(), nullable=False),
    pa.field("patient", pa.string()),
    pa.field("split", _WORD, nullable=False),
]
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vocabulary(_Model):
    """What the ids of a label column mean, and where the labels came from."""

    version: int
    names: list[str]
    source: str


class ShardInfo(_Model):
    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


class PatientInfo(_Model):
    """Number of patients, of images whose patient is unknown, and of images of the patient who has most."""

    known: int
    images_without: int
    most_images: int


class Statistics(_Model):
    """Mean and standard deviation per channel of the train images, in 0..1; `how` says over which pixels."""

    mean: list[float]
    std: list[float]
    images: int
    how: str


class DatasetInfo(_Model):
    """The content of dataset.json."""

    format: Literal[1]
    created_by: str
    options: dict[str, Any]
    samples: int
    quarantined: int
    splits: dict[str, int]
    patients: PatientInfo
    labels: dict[str, Vocabulary]
    bit_depth: int
    channels: int
    statistics: Statistics | None
    shards: list[ShardInfo]
    index_sha256: str
    quarantine_sha256: str
    checksum: str


def canonical(info: Mapping[str, Any]) -> bytes:
    """The one way dataset.json is written, so that any changed byte shows."""
    return (json.dumps(info, sort_keys=True, indent=1) + "\n").encode()


def checksum(info: Mapping[str, Any]) -> str:
    """SHA-256 over all of dataset.json but the checksum itself."""
    return hashlib.sha256(canonical({key: value for key, value in info.items() if key != "checksum"})).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_schema(labels: Sequence[str]) -> pa.Schema:
    """The columns of index.parquet: the fixed ones, then `label.NAME` for each label (int32, -1 unknown)."""
    fields = [pa.field(LABEL_PREFIX + name, pa.int32(), nullable=False) for name in sorted(labels)]
    return pa.schema([*_INDEX_FIELDS, *fields])


def write_dataset(
    folder: Path,
    index: pa.Table,
    quarantine: pa.Table,
    shards: Sequence[ShardInfo],
    labels: Mapping[str, LabelColumn],
    options: Mapping[str, Any],
    statistics: Statistics | None,
) -> DatasetInfo:
    """Write everything beside the shards, which lie in `folder`/shards already; dataset.json comes last.

    Args:
        folder: the dataset, not yet visible to others.
        index: a row a sample, with `index_schema`, in the order of `shards` and of offsets.
        quarantine: with QUARANTINE_SCHEMA.
        shards: sorted by name.
        labels: the vocabularies; their ids are in `index`.
        options: how it was made; nothing with a path or a time.
        statistics: of the train images, None where there are none.
    """
    assert index.schema == index_schema(list(labels)), index.schema
    hashes = {}
    for name, table in ((INDEX, index), (QUARANTINE, quarantine)):
        pq.write_table(table, folder / name, compression="zstd", row_group_size=1 << 17)
        _to_disk(folder / name)
        hashes[name] = file_sha256(folder / name)
    splits = index.column("split").value_counts().to_pylist()
    patients = [row["counts"] for row in index.column("patient").drop_null().value_counts().to_pylist()]
    content: dict[str, Any] = {
        "format": FORMAT,
        "created_by": f"{TOOL} {importlib.metadata.version(TOOL)}",
        "options": dict(options),
        "samples": index.num_rows,
        "quarantined": quarantine.num_rows,
        "splits": {row["values"]: row["counts"] for row in splits},
        "patients": {
            "known": len(patients),
            "images_without": index.column("patient").null_count,
            "most_images": max(patients, default=0),
        },
        "labels": {
            name: {"version": column.version, "names": column.names, "source": column.source}
            for name, column in labels.items()
        },
        "bit_depth": int(index.column("bit_depth").to_numpy().max()),
        "channels": int(index.column("channels").to_numpy().max()),
        "statistics": None if statistics is None else statistics.model_dump(),
        "shards": [shard.model_dump() for shard in shards],
        "index_sha256": hashes[INDEX],
        "quarantine_sha256": hashes[QUARANTINE],
    }
    content["checksum"] = checksum(content)
    (folder / INFO).write_bytes(canonical(content))
    _to_disk(folder / INFO)
    return DatasetInfo.model_validate(content)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def parse_info(raw: bytes, place: str) -> DatasetInfo:
    """Check and read the bytes of a dataset.json.

    Raises:
        UserError: no JSON, not ours, of another format number, or changed since it was written.
    """
    try:
        content = json.loads(raw)
    except ValueError:
        raise UserError(f"{place} is damaged: no valid JSON") from None
    if not isinstance(content, dict) or not str(content.get("created_by", "")).startswith(TOOL + " "):
        raise UserError(f"{place} was not written by {TOOL}")
    if content.get("format") != FORMAT:
        raise UserError(f"{place}: format {content.get('format')!r}; this version reads format {FORMAT}")
    if content.get("checksum") != checksum(content) or raw != canonical(content):
        raise UserError(f"{place} was changed since it was written: its checksum does not match")
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_info(path: Path) -> tuple[DatasetInfo, str]:
    """The dataset.json of a dataset, and its SHA-256.

    Raises:
        UserError: as `parse_info`, or there is none.
    """
    try:
        raw = (path / INFO).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is no prepared dataset: it has no {INFO} (see 'medpretrain prep')") from None
    return parse_info(raw, str(path / INFO)), hashlib.sha256(raw).hexdigest()


def index_problem(index: pa.Table, info: DatasetInfo) -> str | None:
    """Where the index and the list of shards disagree, naming the shard; None where they agree."""
    if index.schema.remove_metadata() != index_schema(list(info.labels)):
        return f"{INDEX} does not have the columns that {INFO} announces"
    shards = _codes(index, "shard", [shard.name for shard in info.shards])
    counts = np.bincount(shards[shards >= 0], minlength=len(info.shards))
    offset, length = index.column("offset").to_numpy(), index.column("length").to_numpy()
    for number in np.flatnonzero(counts != [shard.samples for shard in info.shards]):
        shard = info.shards[number]
        return f"{INDEX} has {counts[number]} samples in {shard.name}, which holds {shard.samples}"
    if (shards < 0).any():
        return f"{INDEX} names a shard that {INFO} does not have"
    sizes = np.array([shard.bytes for shard in info.shards], np.int64)[shards]
    bad = (offset < 0) | (length <= 0) | (offset + length > sizes)
    bad[1:] |= (np.diff(shards) < 0) | ((np.diff(shards) == 0) & (np.diff(offset) <= 0))
    if bad.any():
        row = int(np.argmax(bad))
        return f"{INDEX} does not match {info.shards[shards[row]].name}: sample {row} lies outside it or out of order"
    return None


def _codes(index: pa.Table, column: str, names: Sequence[str]) -> np.ndarray:
    """A dictionary column as int64 places in `names`, -1 for a word that is not there."""
    words = index.column(column).unify_dictionaries().combine_chunks()
    if isinstance(words, pa.ChunkedArray):  # what an empty column becomes
        return np.zeros(0, np.int64)
    place = {name: number for number, name in enumerate(names)}
    table = np.array([place.get(word, -1) for word in words.dictionary.to_pylist()], np.int64)
    return table[words.indices.to_numpy()]


class Dataset:
    """A prepared dataset, opened for reading: columns as arrays, images as bytes of memory-mapped shards.

    Opening reads dataset.json and index.parquet and looks at the sizes of the shards, not into them (`medpretrain
    prep verify` does). A Dataset can be pickled: it opens itself anew, and refuses if the data changed meanwhile.

    Attributes:
        path: the folder.
        info: the content of dataset.json.
        sha256: identity of the data: the hash of dataset.json, which holds the hashes of all else.
        index: index.parquet.
        sizes: (N, 2) int32, height and width.
        shard_ids: (N,) int64, the place of each sample's shard in `info.shards`.
        bit_depth: 8 or 16.
        channels: 1, or 3 where any image has colour.
    """

    def __init__(self, path: Path, info: DatasetInfo, sha256: str, index: pa.Table) -> None:
        self.path = path
        self.info = info
        self.sha256 = sha256
        self.index = index
        self.bit_depth = info.bit_depth
        self.channels = info.channels
        self.sizes = np.stack([index.column(side).to_numpy() for side in ("height", "width")], axis=1)
        self.shard_ids = _codes(index, "shard", [shard.name for shard in info.shards])
        self._splits = list(info.splits)
        self._split_ids = _codes(index, "split", self._splits)
        self._offsets = index.column("offset").to_numpy()
        self._lengths = index.column("length").to_numpy()
        # A mapping holds a file descriptor, and a dataset may have more shards than a process may have of those.
        self._most_open = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Open the dataset in folder `path`.

        Raises:
            UserError: no dataset, a damaged one, or an index that does not match its shards (naming the shard).
        """
        folder = Path(path)
        info, sha256 = read_info(folder)
        for shard in info.shards:
            file = folder / SHARDS / shard.name
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise UserError(f"{folder}: the index does not match its shards: {SHARDS}/{shard.name} {state}")
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder}: {INDEX} is missing")
        if file_sha256(folder / INDEX) != info.index_sha256:
            raise UserError(f"{folder}: {INDEX} was changed since it was written (see 'medpretrain prep verify')")
        index = pq.read_table(folder / INDEX)
        problem = index_problem(index, info)
        if problem is not None:
            raise UserError(f"{folder}: the index does not match its shards: {problem}")
        return cls(folder, info, sha256, index)

    def __len__(self) -> int:
        return self.info.samples

    def rows(self, split: str | None = None) -> np.ndarray:
        """The rows of a split, or all: (n,) int64, ascending.

        Raises:
            UserError: there is no such split, or it is empty; names those there are.
        """
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        rows = np.flatnonzero(self._split_ids == self._splits.index(split)) if split in self._splits else np.zeros(0)
        if not len(rows):
            there = ", ".join(f"{name} ({count} images)" for name, count in self.info.splits.items())
            raise UserError(f"{self.path} has no images in a split {split!r}; it has {there}")
        return rows.astype(np.int64)

    def labels(self, name: str) -> np.ndarray:
        """The ids of a label: (N,) int32, -1 where unknown.

        Raises:
            UserError: there is no such label; names the nearest.
        """
        self._vocabulary(name)
        return self.index.column(LABEL_PREFIX + name).to_numpy()

    def label_names(self, name: str) -> list[str]:
        """What the ids of a label mean.

        Raises:
            UserError: there is no such label; names the nearest.
        """
        return list(self._vocabulary(name).names)

    def _vocabulary(self, name: str) -> Vocabulary:
        if name not in self.info.labels:
            hint = nearest(name, self.info.labels) or "; it has none"
            raise UserError(f"{self.path} has no label {name!r}{hint}")
        return self.info.labels[name]

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """The encoded images of some rows: a 1-D uint8 array each, a read-only view of its mapped shard (no copy)."""
        rows = np.asarray(rows)
        starts = self._offsets[rows]
        places = zip(
            self.shard_ids[rows].tolist(), starts.tolist(), (starts + self._lengths[rows]).tolist(), strict=True
        )
        return [self._shard(number)[start:stop] for number, start, stop in places]

    def _shard(self, number: int) -> np.ndarray:
        mapped = self._open.get(number)
        if mapped is not None:
            self._open.move_to_end(number)
            return mapped
        with (self.path / SHARDS / self.info.shards[number].name).open("rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        self._open[number] = mapped
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)  # unmapped once the last view of it is gone
        return mapped

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.sha256)


def _reopen(path: Path, sha256: str) -> Dataset:
    dataset = Dataset.open(path)
    if dataset.sha256 != sha256:
        raise UserError(f"{path} was replaced by other data while it was in use")
    return dataset
