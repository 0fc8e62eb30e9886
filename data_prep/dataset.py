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
import os
import resource
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.dataset_info import FORMAT, TOOL, DatasetInfo, Vocabulary, canonical, checksum, parse_info
from data_prep.errors import UserError, WorkFailed, nearest

INFO, INDEX, QUARANTINE, SHARDS = "dataset.json", "index.parquet", "quarantine.parquet", "shards"
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
    pa.field("patient", _WORD),
    pa.field("split", _WORD, nullable=False),
    # DICOM's own order above the image, as pseudonyms
    pa.field("study", _WORD),
    pa.field("series", _WORD),
    pa.field("instance", pa.string()),
    pa.field("frame", pa.int32()),
    # What finds the same image twice: see fingerprint.py
    pa.field("digest", pa.binary(16), nullable=False),
    pa.field("phash", pa.uint64(), nullable=False),
]
# What training and evaluation read; the rest is for verify and for people.
_READ = [field.name for field in _INDEX_FIELDS[:11]]
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("patient", pa.string()),
        pa.field("instance", pa.string()),
    ]
)
ROW_GROUP = 1 << 17


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_schema(labels: Sequence[str]) -> pa.Schema:
    """The columns of index.parquet: the fixed ones, then `label.NAME` for each label (int32, -1 unknown)."""
    fields = [pa.field(LABEL_PREFIX + name, pa.int32(), nullable=False) for name in sorted(labels)]
    return pa.schema([*_INDEX_FIELDS, *fields])


class IndexWriter:
    """Writes index.parquet from the tables of one shard after another, and counts what dataset.json says of them."""

    def __init__(self, path: Path, labels: Sequence[str]) -> None:
        self.schema = index_schema(labels)
        self._path = path
        self._file = pq.ParquetWriter(path, self.schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self.samples = 0
        self.splits: Counter[str] = Counter()
        self.patients: Counter[str | None] = Counter()
        self.bit_depths: Counter[int] = Counter()
        self.channels = 1

    def add(self, table: pa.Table) -> None:
        """Append the rows of a shard, with `index_schema`, in the order of their offsets."""
        assert table.schema.remove_metadata() == self.schema, table.schema
        self._waiting.append(table)
        self.samples += len(table)
        for counter, column in ((self.splits, "split"), (self.patients, "patient"), (self.bit_depths, "bit_depth")):
            for row in table.column(column).value_counts().to_pylist():
                counter[row["values"]] += row["counts"]
        self.channels = max(self.channels, pc.max(table.column("channels")).as_py())
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def close(self) -> str:
        """End the file, flush it to disk and return its SHA-256."""
        self._flush()
        self._file.close()
        return to_disk(self._path)

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(pa.concat_tables(self._waiting).unify_dictionaries(), row_group_size=1 << 30)
            self._waiting = []


def write_dataset(
    folder: Path,
    index: IndexWriter,
    quarantine: pa.Table,
    content: Mapping[str, Any],
) -> DatasetInfo:
    """Write everything beside the shards, which are in their place already; dataset.json comes last.

    Args:
        folder: the dataset, not yet visible to others; holds index.parquet.
        index: with every row added.
        quarantine: with QUARANTINE_SCHEMA.
        content: all else that `DatasetInfo` has: nothing in it may tell a path or a time.
    """
    index_sha256 = index.close()
    pq.write_table(quarantine, folder / QUARANTINE, compression="zstd", row_group_size=ROW_GROUP)
    known = {patient: count for patient, count in index.patients.items() if patient is not None}
    full: dict[str, Any] = {
        **content,
        "format": FORMAT,
        "created_by": created_by(),
        "samples": index.samples,
        "quarantined": quarantine.num_rows,
        "splits": dict(index.splits),
        "patients": {
            "known": len(known),
            "images_without": index.patients[None],
            "most_images": max(known.values(), default=0),
        },
        "bit_depth": max(index.bit_depths),
        "channels": index.channels,
        "index_sha256": index_sha256,
        "quarantine_sha256": to_disk(folder / QUARANTINE),
    }
    full["checksum"] = checksum(full)
    (folder / INFO).write_bytes(canonical(full))
    to_disk(folder / INFO)
    return DatasetInfo.model_validate(full)


def created_by() -> str:
    return f"{TOOL} {importlib.metadata.version(TOOL)}"


def to_disk(path: Path) -> str:
    """Flush a file to disk; returns its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


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


class _Shard:
    """An open file, closed once nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WorkFailed(f"{path} cannot be opened any more: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        found = os.pread(self._descriptor, length, offset)
        if len(found) < length:
            raise OSError(f"its shard ends {length - len(found)} bytes too early")
        return found


class Dataset:
    """A prepared dataset, opened for reading: columns as arrays, images as bytes of their shards.

    Opening reads dataset.json and index.parquet and looks at the sizes of the shards, not into them (`medpretrain
    prep verify` does). A Dataset can be pickled: it opens itself anew, and refuses if the data changed meanwhile.

    Attributes:
        path: the folder.
        info: the content of dataset.json.
        sha256: identity of the data: the hash of dataset.json, which holds the hashes of all else.
        index: index.parquet, but for what training does not need (study, series, instance, fingerprints).
        sizes: (N, 2) int32, height and width.
        shard_ids: (N,) int64, the place of each sample's shard in `info.shards`.
        bit_depth: 8 or 16.
        channels: 1, or 3 where any image has colour.
    """

    def __init__(self, path: Path, info: DatasetInfo, sha256: str, index: pa.Table, share: int) -> None:
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
        # A dataset may have more shards than a process may have open files.
        self._share = share
        self._most_open = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // (2 * share))
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._opening = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, share: int = 1) -> Dataset:
        """Open the dataset in folder `path`; `share` is how many are to be open at a time in one process.

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
        if pq.read_schema(folder / INDEX).remove_metadata() != index_schema(list(info.labels)):
            raise UserError(f"{folder}: {INDEX} does not have the columns that {INFO} announces")
        columns = [*_READ, *(LABEL_PREFIX + name for name in info.labels)]
        index = pq.read_table(folder / INDEX, columns=columns)
        problem = index_problem(index, info)
        if problem is not None:
            raise UserError(f"{folder}: the index does not match its shards: {problem}")
        return cls(folder, info, sha256, index, share)

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

    def sample_name(self, row: int) -> tuple[str, str]:
        """The shard of a row and its key there: how a message names a sample."""
        return self.info.shards[self.shard_ids[row]].name, self.index.column("key")[row].as_py()

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """The encoded images of some rows: a read-only 1-D uint8 array each.

        They are read and not mapped, for where a mapped file has become shorter or its disk fails, the process is
        killed (SIGBUS).

        Raises:
            OSError: an image cannot be read, or its shard ends before it does.
            WorkFailed: a shard cannot be opened any more.
        """
        rows = np.asarray(rows)
        places = zip(
            self.shard_ids[rows].tolist(), self._offsets[rows].tolist(), self._lengths[rows].tolist(), strict=True
        )
        return [np.frombuffer(self._bytes(*place), np.uint8) for place in places]

    def _bytes(self, number: int, offset: int, length: int) -> bytes:
        try:
            return self._shard(number).read(offset, length)
        except OSError:
            # Whoever puts a damaged file right writes another one in its place: what is open is still the old.
            with self._opening:
                self._open.pop(number, None)
            return self._shard(number).read(offset, length)

    def _shard(self, number: int) -> _Shard:
        with self._opening:  # streams of several threads read from one dataset
            shard = self._open.pop(number, None) or _Shard(self.path / SHARDS / self.info.shards[number].name)
            self._open[number] = shard
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return shard

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.sha256, self._share)


def _reopen(path: Path, sha256: str, share: int) -> Dataset:
    dataset = Dataset.open(path, share)
    if dataset.sha256 != sha256:
        raise UserError(f"{path} was replaced by other data while it was in use")
    return dataset
