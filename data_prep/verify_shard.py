"""What is checked of one shard: its bytes, its order, its agreement with the index, every image, other readers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep import verify_readers
from data_prep.dataset import INDEX, LABEL_PREFIX, SHARDS, file_sha256
from data_prep.dataset_info import ShardInfo
from data_prep.duplicates import MAX_DISTANCE
from data_prep.fingerprint import NO_PHASH, fingerprint_of_file
from data_prep.quarantine import Rejected
from data_prep.samples import from_bytes
from data_prep.shard import INDEX_VERSION, Member, ShardError, index_line, members
from data_prep.store import Store
from data_prep.verify_readers import READERS, NotLoaded, ReaderFailed, hashed

_KEY = re.compile(r"[0-9]{9,}(?:-([0-9]{5,}))?")
_SAID = ("split", "width", "height", "bit_depth", "channels", "patient")
_SAID_IF_KNOWN = ("study", "series", "instance", "frame")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, relative to the dataset, and what is wrong with it."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass(frozen=True)
class Check:
    """What is the same for all shards.

    `labels` has the names of each label; `trusted` says that digests may be of files; `readers` are keys of READERS.
    """

    store: Store
    labels: dict[str, list[str]]
    trusted: bool
    decode: bool
    readers: tuple[str, ...]


class Work(NamedTuple):
    """One shard, its place in the list, and its rows of the index (None where they cannot be judged)."""

    number: int
    shard: ShardInfo
    rows: pa.Table | None


class Found(NamedTuple):
    """What is wrong with the shard, and what could not be tried."""

    number: int
    problems: list[Problem]
    notes: list[str]


def open_whole(
    stack: contextlib.ExitStack, store: Store, name: str, sha256: str, size: int | None = None
) -> Path | Problem:
    """A file of the dataset, on this machine as long as `stack` is open, if it is the one that was written."""
    try:
        found = store.size(name)
        if found is None:
            return Problem(name, "is missing")
        if size is not None and found != size:
            return Problem(name, f"has {found} bytes, not {size}")
        file = stack.enter_context(store.local(name))
        if file_sha256(file) != sha256:
            return Problem(name, "is damaged: its SHA-256 does not match")
    except OSError as error:  # a disk that fails, a folder in the file's place
        return Problem(name, f"cannot be read: {error.strerror}")
    return file


def check_shard(check: Check, work: Work) -> Found:
    """Everything that can be said of one shard; stops at the first kind of damage that makes the rest meaningless."""
    shard = work.shard
    name = f"{SHARDS}/{shard.name}"
    idx_name = f"{SHARDS}/{shard.name.removesuffix('.tar')}.idx"
    with contextlib.ExitStack() as stack:
        tar = open_whole(stack, check.store, name, shard.sha256, shard.bytes)
        idx = open_whole(stack, check.store, idx_name, shard.idx_sha256)
        if isinstance(tar, Problem) or isinstance(idx, Problem):
            return Found(work.number, [found for found in (tar, idx) if isinstance(found, Problem)], [])
        try:
            pairs = _pairs(tar)
        except ShardError as error:
            return Found(work.number, [Problem(name, str(error))], [])
        if len(pairs) != shard.samples:
            return Found(work.number, [Problem(name, f"holds {len(pairs)} samples, not {shard.samples}")], [])
        problems = []
        lines = [f"{INDEX_VERSION} {shard.samples}\n", *(index_line(image, record) for image, record in pairs)]
        if idx.read_bytes() != "".join(lines).encode():
            problems.append(Problem(idx_name, "does not describe its tar"))
        notes: list[str] = []
        if work.rows is not None:
            rows = work.rows.to_pylist()
            mismatch = _mismatch(check, shard.name, rows, tar, pairs)
            if mismatch is not None:
                problems.append(mismatch)
            elif check.decode:
                problems += _image_problems(check, name, rows, tar)
        if check.readers and not problems:
            for reader in check.readers:
                try:
                    read = verify_readers.read_shard(reader, tar, idx)
                except NotLoaded as failure:
                    notes.append(f"not tried: {READERS[reader]} is installed and cannot be loaded: it {failure}")
                except ReaderFailed as failure:
                    problems.append(Problem(name, f"cannot be read by {READERS[reader]}: it {failure}"))
                else:
                    problems += _differences(name, reader, read, tar, pairs)
    return Found(work.number, problems, notes)


def _pairs(tar: Path) -> list[tuple[Member, Member]]:
    """Image and record of each sample.

    Raises:
        ShardError: the tar is not one that ShardWriter wrote.
    """
    walk = list(members(tar))
    if len(walk) % 2:
        raise ShardError("does not hold pairs of an image and its JSON")
    return list(zip(walk[::2], walk[1::2], strict=True))


def _mismatch(
    check: Check, shard: str, rows: list[dict[str, Any]], tar: Path, pairs: list[tuple[Member, Member]]
) -> Problem | None:
    """The first sample that is another in the index than in the shard."""
    split = shard.rpartition("-")[0]
    for row, (image, record), data in zip(rows, pairs, _read(tar, (pair[1] for pair in pairs)), strict=True):
        key = row["key"]
        if (image.name, image.offset, image.size) != (f"{key}.{row['extension']}", row["offset"], row["length"]):
            return Problem(INDEX, f"does not match {shard} at sample {key}")
        if record.name != f"{key}.json" or not _same(check, data, row):
            return Problem(f"{SHARDS}/{shard}", f"the JSON of sample {key} does not match {INDEX}")
        form = _KEY.fullmatch(key)
        if form is None or (None if form[1] is None else int(form[1])) != row["frame"]:
            return Problem(INDEX, f"sample {key} of {shard} has no proper key")
        if row["split"] != split:
            return Problem(INDEX, f"sample {key} of {shard} is of the split {row['split']!r}")
    return None


def _same(check: Check, record: bytes, row: dict[str, Any]) -> bool:
    """Whether a sample's JSON is, to the byte, what its row gives; `about` alone is in no row."""
    labels = {}
    for name, names in check.labels.items():
        place = row[LABEL_PREFIX + name]
        if not -1 <= place < len(names):
            return False
        labels[name] = names[place] if place >= 0 else None
    try:
        said = json.loads(record)
    except ValueError:
        return False
    if not isinstance(said, dict) or said.get("labels") != labels:
        return False
    expected = {name: row[name] for name in _SAID}
    expected["labels"] = said["labels"]  # dataset.json, being sorted, does not know their order
    expected |= {name: row[name] for name in _SAID_IF_KNOWN if row[name] is not None}
    if isinstance(said.get("about"), dict):
        expected["about"] = said["about"]
    return record == json.dumps(expected, separators=(",", ":")).encode()


def _image_problems(check: Check, name: str, rows: list[dict[str, Any]], tar: Path) -> list[Problem]:
    """The first image that is not what its row says, and how many there are."""
    bad = []
    images = (Member("", row["offset"], row["length"]) for row in rows)
    for row, data in zip(rows, _read(tar, images), strict=True):
        what = _image_problem(data, row, check.trusted)
        if what is not None:
            bad.append(f"image {row['key']} {what}")
    if not bad:
        return []
    return [Problem(name, bad[0] + (f" (and {len(bad) - 1} more images here)" if len(bad) > 1 else ""))]


def _image_problem(data: bytes, row: dict[str, Any], trusted: bool) -> str | None:
    """Prepare a stored image again: it must come back as it is, with the size and fingerprint of its row."""
    try:
        sample = from_bytes(data)
    except Rejected as reason:
        return f"cannot be decoded: {reason.message}"
    if sample.data != data:
        return "holds metadata, or is of a form that not every decoder reads alike"
    shape = (sample.extension, sample.width, sample.height, sample.bit_depth, sample.channels)
    said = tuple(row[column] for column in ("extension", "width", "height", "bit_depth", "channels"))
    if shape != said:
        return f"is {_shape(*shape)}, and its row says {_shape(*said)}"
    mark = sample.fingerprint
    # Known by its bytes is what was not decoded, and a JPEG that was made here; its hash is of the picture before.
    if row["digest"] == fingerprint_of_file(data).digest and (trusted or row["extension"] == "jpg"):
        near = (row["phash"] ^ mark.phash).bit_count() <= MAX_DISTANCE
        return None if near or row["phash"] == NO_PHASH else "looks unlike the picture its perceptual hash is of"
    if (row["digest"], row["phash"]) != mark:
        return "has other pixels than those its fingerprint is of"
    return None


def _shape(extension: str, width: int, height: int, bit_depth: int, channels: int) -> str:
    return f"{extension} of {width} x {height} x {channels} at {bit_depth} bits"


def _differences(
    name: str, reader: str, read: list[verify_readers.Read], tar: Path, pairs: list[tuple[Member, Member]]
) -> list[Problem]:
    """Where a library gives other samples, or another order, than the tar has."""
    if len(read) != len(pairs):
        return [Problem(name, f"{READERS[reader]} reads {len(read)} samples of {len(pairs)}")]
    data = _read(tar, (member for pair in pairs for member in pair))
    for given, (image, _) in zip(read, pairs, strict=True):
        if given != (image.name, hashed(next(data)), hashed(next(data))):
            return [Problem(name, f"{READERS[reader]} reads something else than {image.name}")]
    return []


def _read(tar: Path, wanted: Iterator[Member]) -> Iterator[bytes]:
    with tar.open("rb") as file:
        for member in wanted:
            file.seek(member.offset)
            yield file.read(member.size)
