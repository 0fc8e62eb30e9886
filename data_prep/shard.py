"""One WebDataset shard: a USTAR file and the DALI index beside it, written in one pass and walked back strictly.

A sample is two adjacent members, `KEY.jpg|png` and `KEY.json`. Owner, mode and time are constants, so the same samples
give the same bytes. Python's own tarfile writes a third as fast (an object and a dictionary a member).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
KEY = re.compile(r"[a-z0-9_-]{1,80}")
EXTENSIONS = ("jpg", "png")
INDEX_VERSION = "v1.2"
MAX_MEMBER = 8**11  # an octal size of 11 digits


class ShardError(ValueError):
    """A tar file is not one that ShardWriter wrote; the message says what is wrong and at which byte."""


class ShardFile(NamedTuple):
    """What was written: number of samples, size in bytes, SHA-256 of the tar and of its index."""

    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


class Member(NamedTuple):
    """One file in a shard; `offset` is that of its first data byte."""

    name: str
    offset: int
    size: int


# mode, uid, gid | mtime | type, linkname, magic and version, owner names, device numbers, prefix, padding
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_AFTER_SUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(155 + 12)
# The checksum counts its own field as eight spaces.
_CONSTANT_SUM = sum(_BEFORE_SIZE) + sum(_MTIME) + sum(_AFTER_SUM) + 8 * ord(" ")
_PADDING = [bytes(-size % BLOCK) for size in range(BLOCK)]
_END = bytes(2 * BLOCK)


def header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a member's data."""
    assert len(name) <= 100, name
    assert size < MAX_MEMBER, size
    digits = b"%011o\0" % size
    checksum = _CONSTANT_SUM + sum(name) + sum(digits)
    return b"".join(
        (name.ljust(100, b"\0"), _BEFORE_SIZE, digits, _MTIME, b"%06o\0 " % checksum, _AFTER_SUM),
    )


class ShardWriter:
    """Writes `path` (a new .tar) and, on close, the .idx beside it; as a context, leaves no file unless closed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = ShardWriter(Path(folder) / "train-00000.tar")
    ...     offset = writer.add("000000001", "png", b"pixels", b"{}")
    ...     (offset, writer.close().samples)
    (512, 1)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._lines: list[str] = []

    def add(self, key: str, extension: str, image: bytes, record: bytes) -> int:
        """Append a sample; returns the offset of the image's first byte.

        Args:
            key: `[a-z0-9_-]{1,80}`, not used before.
            extension: `jpg` or `png`.
            image: the encoded image.
            record: the sample's JSON.
        """
        assert KEY.fullmatch(key), key
        assert extension in EXTENSIONS, extension
        image_name = f"{key}.{extension}"
        record_name = f"{key}.json"
        chunk = b"".join(
            (
                header(image_name.encode(), len(image)),
                image,
                _PADDING[len(image) % BLOCK],
                header(record_name.encode(), len(record)),
                record,
                _PADDING[len(record) % BLOCK],
            )
        )
        offset = self._size + BLOCK
        record_offset = offset + len(image) + len(_PADDING[len(image) % BLOCK]) + BLOCK
        self._lines.append(
            index_line(Member(image_name, offset, len(image)), Member(record_name, record_offset, len(record)))
        )
        self._file.write(chunk)
        self._sha256.update(chunk)
        self._size += len(chunk)
        return offset

    def close(self) -> ShardFile:
        """End the tar, write the index, and flush both to disk."""
        self._file.write(_END)
        self._sha256.update(_END)
        self._size += len(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = f"{INDEX_VERSION} {len(self._lines)}\n{''.join(self._lines)}".encode()
        with self.path.with_suffix(".idx").open("xb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        return ShardFile(len(self._lines), self._size, self._sha256.hexdigest(), hashlib.sha256(index).hexdigest())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove a shard that was not closed."""
        if not self._file.closed:
            self._file.close()
            self.path.unlink()


def index_line(image: Member, record: Member) -> str:
    """One sample's line of DALI's index: `ext offset size name` for both members."""
    return (
        f"{image.name.rpartition('.')[2]} {image.offset} {image.size} {image.name} "
        f"json {record.offset} {record.size} {record.name}\n"
    )


def members(path: Path) -> Iterator[Member]:
    """Walk a shard's members in order, reading headers only.

    Raises:
        ShardError: a header, a padding or the end differs from what ShardWriter writes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = 0
        while True:
            block = file.read(BLOCK)
            if not any(block):
                break
            end_of_name = block.find(b"\0")
            digits = block[124:135]
            if not 0 < end_of_name <= 100 or not re.fullmatch(rb"[0-7]{11}", digits):
                raise ShardError(f"no member header at byte {offset}")
            length = int(digits, 8)
            name = block[:end_of_name]
            if block != header(name, length) or not name.isascii():
                raise ShardError(f"a damaged member header at byte {offset}")
            yield Member(name.decode("ascii"), offset + BLOCK, length)
            file.seek(length, os.SEEK_CUR)
            padding = _PADDING[length % BLOCK]
            if file.read(len(padding)) != padding:
                raise ShardError(f"a member that is cut at byte {offset}")
            offset += BLOCK + length + len(padding)
        if block + file.read(BLOCK) != _END or offset + len(_END) != size:
            raise ShardError(f"no proper end of the tar at byte {offset}")
