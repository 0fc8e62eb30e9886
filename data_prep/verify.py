"""Find every flipped, cut, missing, swapped or added byte of a dataset, with memory that does not grow with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dataset import (
    INDEX,
    INFO,
    QUARANTINE,
    SHARDS,
    file_sha256,
    index_schema,
)
from data_prep.dataset_info import DatasetInfo, ShardInfo, parse_info
from data_prep.errors import UserError
from data_prep.shard import INDEX_VERSION, ShardError, index_line, members
from data_prep.staging import stray_files
from data_prep.store import FolderStore


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, relative to the dataset, and what is wrong with it."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify(path: str | Path, on_progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Compare a dataset with its own record of hashes, and its shards with its index.

    Every byte of every file is read. A change made together with a new set of matching hashes is not found: compare
    `Dataset.sha256` with a copy kept elsewhere for that.

    Args:
        path: the dataset.
        on_progress: called after each shard with shards done and shards in all.

    Returns:
        What is wrong; empty where nothing is.

    Raises:
        UserError: there is no dataset at `path`.
    """
    folder = Path(path)
    if not (folder / INFO).is_file() and not (folder / SHARDS).is_dir():
        raise UserError(f"{folder} is no prepared dataset: it has no {INFO}")
    if not (folder / INFO).is_file():
        return [Problem(INFO, "is missing")]
    try:
        info = parse_info((folder / INFO).read_bytes(), INFO)
    except UserError as error:
        # Its hashes cannot be trusted, so nothing else can be judged by them.
        return [Problem(INFO, str(error))]
    problems = [
        Problem(name, "does not belong to the dataset")
        for name in stray_files(FolderStore(folder, folder).names(), info)
    ]
    tables = []
    for name, sha256 in ((INDEX, info.index_sha256), (QUARANTINE, info.quarantine_sha256)):
        found = _file_problem(folder, name, sha256)
        problems += found
        if not found:
            tables.append(name)
    index = _IndexRows(folder / INDEX, info) if INDEX in tables else None
    if index is not None and index.problem:
        problems.append(Problem(INDEX, index.problem))
        index = None
    for number, shard in enumerate(info.shards, start=1):
        found = list(_shard_problems(folder, shard))
        problems += found
        if index is not None:
            # The rows are taken from the stream even where the shard is damaged, to stay in step.
            problem = index.mismatch(None if found else folder / SHARDS / shard.name, shard)
            if problem is not None:
                problems.append(problem)
        if on_progress is not None:
            on_progress(number, len(info.shards))
    if index is not None and next(index.rows, None) is not None:
        problems.append(Problem(INDEX, "has more rows than the shards have samples"))
    return problems


def _file_problem(folder: Path, name: str, sha256: str, size: int | None = None) -> list[Problem]:
    file = folder / name
    if not file.is_file():
        return [Problem(name, "is missing")]
    found = file.stat().st_size
    if size is not None and found != size:
        return [Problem(name, f"has {found} bytes, not {size}")]
    if file_sha256(file) != sha256:
        return [Problem(name, "is damaged: its SHA-256 does not match")]
    return []


def _shard_problems(folder: Path, shard: ShardInfo) -> Iterator[Problem]:
    """Damage to a tar or its index, and disagreement between the two."""
    name = f"{SHARDS}/{shard.name}"
    idx = f"{SHARDS}/{shard.name.removesuffix('.tar')}.idx"
    found = _file_problem(folder, name, shard.sha256, shard.bytes)
    found_idx = _file_problem(folder, idx, shard.idx_sha256)
    yield from found
    yield from found_idx
    if found or found_idx:
        return
    lines = [f"{INDEX_VERSION} {shard.samples}\n"]
    try:
        walk = members(folder / name)
        lines += [index_line(image, record) for image, record in zip(walk, walk, strict=True)]
    except ShardError as error:
        yield Problem(name, str(error))
        return
    except ValueError:  # zip's, for an odd number of members
        yield Problem(name, "does not hold pairs of an image and its JSON")
        return
    if len(lines) != shard.samples + 1:
        yield Problem(name, f"holds {len(lines) - 1} samples, not {shard.samples}")
    elif (folder / idx).read_bytes() != "".join(lines).encode():
        yield Problem(idx, "does not describe its tar")


class _IndexRows:
    """The rows of index.parquet as a stream, taken shard by shard."""

    def __init__(self, path: Path, info: DatasetInfo) -> None:
        self.problem: str | None = None
        try:
            self._file = pq.ParquetFile(path)
            if self._file.schema_arrow.remove_metadata() != index_schema(list(info.labels)):
                self.problem = f"does not have the columns that {INFO} announces"
        except (pa.ArrowException, OSError) as error:
            self.problem = f"is no readable Parquet file: {error}"
        self._info = info
        self.rows = self._stream()

    def _stream(self) -> Iterator[dict[str, Any]]:
        for batch in self._file.iter_batches(batch_size=1 << 12):
            yield from batch.to_pylist()

    def mismatch(self, tar: Path | None, shard: ShardInfo) -> Problem | None:
        """Take a shard's rows; compare them with its members unless `tar` is None."""
        rows = list(itertools.islice(self.rows, shard.samples))
        held = sum(row["shard"] == shard.name for row in rows)
        if held != shard.samples:
            return Problem(INDEX, f"has {held} rows for {shard.name}, which holds {shard.samples}")
        if tar is None:
            return None
        walk = members(tar)
        with tar.open("rb") as file:
            for row, image, record in zip(rows, walk, walk, strict=True):
                name = f"{row['key']}.{row['extension']}"
                if (image.name, image.offset, image.size) != (name, row["offset"], row["length"]):
                    return Problem(INDEX, f"does not match {shard.name} at sample {row['key']}")
                file.seek(record.offset)
                if record.name != f"{row['key']}.json" or not self._same(file.read(record.size), row):
                    return Problem(f"{SHARDS}/{shard.name}", f"the JSON of sample {row['key']} does not match {INDEX}")
        return None

    def _same(self, record: bytes, row: dict[str, Any]) -> bool:
        """Whether a sample's JSON says what its row says."""
        labels = {}
        for name, vocabulary in self._info.labels.items():
            place = row[f"label.{name}"]
            labels[name] = vocabulary.names[place] if 0 <= place < len(vocabulary.names) else None
        said = {name: row[name] for name in ("split", "width", "height", "bit_depth", "channels", "patient")}
        try:
            return bool(json.loads(record) == {**said, "labels": labels})
        except ValueError:
            return False
