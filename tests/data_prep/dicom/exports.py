"""Whole exports of planted files, all that a run says and leaves, and a search for secrets in it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import io
import json
import logging
import os
import re
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tests.data_prep.dicom.planted import COLUMNS, FRAMES, KINDS, ROWS, SCAN, Planted, planted

LAYOUTS = ("folder", "bare names", "archives", "one archive", "DICOMDIR", "only what DICOMDIR lists")
_GRAM = 6
Needles = dict[bytes, str]


@dataclass(frozen=True)
class Export:
    """Files, and how they lie on disk (of LAYOUTS)."""

    files: tuple[Planted, ...]
    layout: str

    def __repr__(self) -> str:
        return f"Export({[file.kind for file in self.files]}, {self.layout!r})"

    def write(self, folder: Path) -> Path:
        """Write it below `folder`, and return what the command is given as SOURCE."""
        root = folder / "export"
        root.mkdir()
        if self.layout == "one archive":
            return _archive(root / "all.zip", {file.name: file.data for file in self.files})
        if self.layout == "archives":
            for file in self.files:
                path = root / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                _archive(path.with_suffix(".zip"), {file.name: file.data})
            return root
        listed = []
        for file in self.files:
            name = file.name if self.layout == "folder" else file.name.removesuffix(".dcm")
            if "DICOMDIR" in self.layout:  # of its names only capitals, digits and _ are read
                name = "/".join(re.findall(r"ZQ\w{8}", file.name)[:3])
                listed.append(name.split("/"))
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
        if not listed:
            return root
        gone = [*listed[0][:-1], listed[0][-1] + "X"]
        (root / "DICOMDIR").write_bytes(_directory([*listed, gone], self.files[0]))
        return root / "DICOMDIR" if self.layout.startswith("only") else root

    @property
    def of_name(self) -> set[bytes]:
        return {secret.lower() for file in self.files for secret in file.of_name}

    def needles(self, private: bool = False) -> Needles:
        """What must not be found, in lower case -> what it is; `private`: names of files may be there."""
        found: Needles = {}
        for file in self.files:
            for secret in file.sentinels:
                if not (private and secret.lower() in self.of_name):
                    for how, written in _written(secret):
                        found[written.lower()] = how
            for value in {*file.values, *file.identity}:
                for how, written in _hashed(value):
                    found[written] = how
        return found


def exports() -> st.SearchStrategy[Export]:
    files = st.lists(planted(), min_size=1, max_size=4, unique_by=lambda file: file.identity)
    return st.builds(Export, files.map(tuple), st.sampled_from(LAYOUTS))


def _written(secret: bytes) -> Iterator[tuple[str, bytes]]:
    yield "plain", secret
    yield "reversed", secret[::-1]
    yield "hex", secret.hex().encode()
    for before in range(3):  # where a secret begins within three bytes decides its letters
        start, end = -(-before * 4 // 3), (before + len(secret)) // 3 * 4
        yield "base64", base64.b64encode(bytes(before) + secret)[start:end]


def _hashed(value: str) -> Iterator[tuple[str, bytes]]:
    """A hash without a key is found again by hashing all numbers."""
    for text in {value, value.strip(), unicodedata.normalize("NFC", value)}:
        for name in ("md5", "sha1", "sha256", "blake2b"):
            yield name, hashlib.new(name, text.encode()).hexdigest()[:16].encode()


def found(needles: Needles, heaps: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """The needles in any heap, whatever the case."""
    hits = []
    for heap in heaps:
        heap = heap.lower()
        grams = {heap[i : i + _GRAM] for i in range(len(heap) - _GRAM + 1)}
        for needle, how in needles.items():
            # Eight digits of a date may stand in a hash by chance, so they count alone only.
            if needle[:_GRAM] in grams and re.search(
                rb"(?<![0-9a-f])%b(?![0-9a-f])" % needle if needle.isdigit() else re.escape(needle), heap
            ):
                hits.append((how, needle))
    return hits


def heaps(*folders: Path) -> Iterator[bytes]:
    """Every file below the folders as it is, with its name, and what of it is packed as text."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            yield str(path.relative_to(folder)).encode("utf-8", "surrogateescape")
            if not path.is_file():
                continue
            data = path.read_bytes()
            yield data
            if path.suffix == ".parquet":
                yield parquet_text(path)


def parquet_text(path: Path) -> bytes:
    table = pq.read_table(path)
    said = [str(table.schema), str(table.schema.metadata), str(pq.ParquetFile(path).metadata), table.to_pylist()]
    return json.dumps(said, ensure_ascii=False, default=lambda value: value.hex()).encode("utf-8", "surrogateescape")


def pictures(kind: str) -> list[np.ndarray]:
    """The 8-bit images that an accepted file of a kind becomes, by the equations of the standard."""
    ramp = np.add.outer(np.arange(ROWS), np.arange(COLUMNS))
    if KINDS[kind][1] in ("US", "OP"):
        colour = np.stack([ramp, ramp * 2, 255 - ramp], axis=-1)
        left, top, right, bottom = SCAN
        return [colour[top : bottom + 1, left : right + 1] if kind == "US" else colour]
    found = []
    for frame in range(FRAMES.get(kind, 1)):
        values = ramp * 16 + frame - (1024 if kind == "CT" else 0)
        gray = np.rint(np.clip((values - (800 - 0.5)) / (1600 - 1) + 0.5, 0, 1) * 255)
        found.append(255 - gray if kind == "CR" else gray)
    return found


def samples(out: Path) -> dict[str, tuple[bytes, dict[str, Any], str]]:
    """Key -> (image, record, shard), in the order of the shards."""
    parts: dict[str, dict[str, bytes]] = {}
    shards: dict[str, str] = {}
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                parts.setdefault(key, {})["record" if extension == "json" else "image"] = file.read()
                shards[key] = path.name
    return {key: (part["image"], json.loads(part["record"]), shards[key]) for key, part in parts.items()}


def pixels(image: bytes) -> np.ndarray:
    """A PNG's or JPEG's pixels, int64; a PNG holds nothing else."""
    if image.startswith(b"\x89PNG"):
        assert set(re.findall(rb"(?s)([a-zA-Z]{4})", _chunk_names(image))) == {b"IHDR", b"IDAT", b"IEND"}
    return np.asarray(Image.open(io.BytesIO(image))).astype(np.int64)


def _chunk_names(image: bytes) -> bytes:
    names, position = b"", 8
    while position < len(image):
        length = int.from_bytes(image[position : position + 4], "big")
        names += image[position + 4 : position + 8]
        position += 12 + length
    return names


def pseudonym(key: bytes, letter: str, *values: str) -> str | None:
    """RFC 2104 by `hmac`, over the letter and each value with its length before it."""
    parts = [unicodedata.normalize("NFC", value).strip(" \0\t\r\n").encode() for value in values]
    if not parts[0]:
        return None
    message = b"medpretrain " + letter.encode() + b"".join(str(len(part)).encode() + b":" + part for part in parts)
    return letter + hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


@contextlib.contextmanager
def overheard() -> Iterator[list[bytes]]:
    """All that is printed (by C libraries too), logged and warned meanwhile; in the list once it ends."""
    said: list[bytes] = []
    root = logging.getLogger()
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    level = root.level
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        kept = [os.dup(1), os.dup(2)]
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield said
        finally:
            sys.stdout.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for handle in kept:
                os.close(handle)
            root.removeHandler(handler)
            root.setLevel(level)
            file.seek(0)
            printed = [text.getvalue(), *(str(warning.message) for warning in warned)]
            said += [file.read(), *(line.encode("utf-8", "surrogateescape") for line in printed)]


def _archive(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def _directory(listed: list[list[str]], file: Planted) -> bytes:
    """A DICOMDIR, whose records say the patient too."""
    dataset = Dataset()
    dataset.FileSetID = "ZQ"
    dataset.DirectoryRecordSequence = []
    for parts in listed:
        record = Dataset()
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = parts
        record.PatientID = re.findall(r"ZQ\w{8}", file.identity[0])[0]
        record.ReferencedSOPInstanceUIDInFile = file.identity[4]
        dataset.DirectoryRecordSequence.append(record)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(buffer, FileDataset(buffer, dataset, preamble=bytes(128), file_meta=meta))
    return buffer.getvalue()
