"""A DICOM header as plain values: read without pixels, each attribute as text, numbers or items, never an exception.

pydicom converts an element on first access; on broken files that raises, or warns with the value in the message. So
the raw bytes are read here and decoded by rules that fit on a page; pydicom converts nothing but sequences, silenced.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from lzma import LZMAError
from typing import Any, BinaryIO

import pydicom
from pydicom.charset import decode_bytes, python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag

from data_prep.errors import UserError
from data_prep.quarantine import Rejected

# What pydicom raises on bytes that are no DICOM; a fuzz test looks for more.
PARSE_ERRORS = (
    AssertionError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
FIRST_READ = 1 << 16  # bytes; most headers are shorter, and one read costs less than pydicom's many small ones

_NUMBER = re.compile(r"[+-]?(\d{1,16}\.?\d{0,16}|\.\d{1,16})([eE][+-]?\d{1,3})?", re.ASCII)
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_VRS = frozenset(b"AE AS AT CS DA DS DT IS LO LT OB OW PN SH SL SQ SS ST TM UI UL UN US UT".split())


@contextmanager
def silenced() -> Iterator[None]:
    """Keep pydicom from warning and logging: its messages quote values of the file. Not for several threads at once."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before


@contextmanager
def wordless() -> Iterator[None]:
    """Let an error that nobody foresaw end the run without its text, which a library may have taken from the file."""
    try:
        yield
    except (Rejected, UserError):
        raise
    except Exception as error:
        problem = RuntimeError(
            f"{type(error).__name__} on a DICOM file; its text is left out, for it may quote the file"
        )
        raise problem.with_traceback(error.__traceback__) from None


@cache
def tag(keyword: str) -> BaseTag:
    """The tag of an attribute by its keyword in PS3.6."""
    found = tag_for_keyword(keyword)
    assert found is not None, keyword
    return BaseTag(found)


def read_header(file: BinaryIO, keywords: Iterable[str] | None = None) -> Dataset:
    """Read a file's header up to the pixel data, from where `file` stands to its end.

    A file without preamble is read where its first element is one that a dataset can begin with.

    Args:
        file: seekable, at its start.
        keywords: the attributes to read; None reads all.

    Raises:
        Rejected: `not_dicom`, `empty`; `bad_header` where the elements make no sense; `unreadable`.
    """
    tags = None if keywords is None else [tag(keyword) for keyword in keywords]
    try:
        start = file.read(FIRST_READ)
        if not start:
            raise Rejected("empty")
        force = start[128:132] != b"DICM"
        if force and not _begins_like_a_dataset(start):
            raise Rejected("not_dicom")
        whole = len(start) < FIRST_READ
        buffer = io.BytesIO(start)
        try:
            dataset = _parse(buffer, tags, force)
            if whole or buffer.tell() < len(start):
                return dataset
        except (*PARSE_ERRORS, OSError):
            if whole:
                raise
        file.seek(0)
        return _parse(file, tags, force)
    except OSError as error:  # without a number it is pydicom's own, on what it reads
        raise Rejected("bad_header" if error.errno is None else "unreadable") from None
    except (zipfile.BadZipFile, LZMAError):  # the file is a member of a damaged archive
        raise Rejected("corrupt") from None
    except PARSE_ERRORS:
        raise Rejected("bad_header") from None


def read_whole(data: bytes) -> Dataset:
    """Read a whole file, pixel data included, by the rules of `read_header`.

    Raises:
        Rejected: as `read_header`.
    """
    if not data:
        raise Rejected("empty")
    force = data[128:132] != b"DICM"
    if force and not _begins_like_a_dataset(data[:FIRST_READ]):
        raise Rejected("not_dicom")
    try:
        with silenced():
            return pydicom.dcmread(io.BytesIO(data), force=force)
    except (*PARSE_ERRORS, OSError):
        raise Rejected("bad_header") from None


def _parse(file: BinaryIO, tags: list[BaseTag] | None, force: bool) -> Dataset:
    with silenced():
        return pydicom.dcmread(file, stop_before_pixels=True, force=force, specific_tags=tags)


def _begins_like_a_dataset(start: bytes) -> bool:
    """Is there, at byte 0, an element of group 0002 or an early one of group 0008, in any of the three encodings?"""
    if len(start) < 8:
        return False
    for order in "<>":
        group, element = struct.unpack_from(order + "HH", start)
        if (group == 2 and element <= 0x102) or (group == 8 and element <= 0x60):
            (length,) = struct.unpack_from("<I", start, 4)
            return start[4:6] in _VRS or (order == "<" and length <= 256)
    return False


def element(dataset: Dataset, keyword: str) -> Any:
    """The element as it stands, raw where pydicom has not converted it, or None."""
    return dataset.get_item(tag(keyword), keep_deferred=True)  # else pydicom converts what is empty


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """The values of a text attribute, padding stripped; [] where it is absent, or holds anything but ASCII.

    For attributes whose values are compared with a closed list; identifiers are read by `identifier`.
    """
    found = element(dataset, keyword)
    value: Any = None if found is None else found.value
    if isinstance(value, bytes):
        if not value.isascii():
            return []
        parts = value.decode("ascii").split("\\")
    elif isinstance(value, str):
        parts = value.split("\\")
    elif isinstance(value, (list, tuple, MultiValue)):
        parts = [part for part in value if isinstance(part, str)]
    else:
        return []
    return [part.strip(" \0\t\r\n") for part in parts if part.isascii()]


def text(dataset: Dataset, keyword: str) -> str:
    """The only value of a text attribute, or "" where there is none or several."""
    values = texts(dataset, keyword)
    return values[0] if len(values) == 1 else ""


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The values of a numeric attribute (DS, IS or binary); [] where any of them is not a finite number."""
    found = element(dataset, keyword)
    if found is None:
        return []
    value = found.value
    if isinstance(value, bytes):
        vr = found.VR if found.VR not in (None, "UN") else dictionary_VR(tag(keyword))
        if vr.startswith("US or"):
            vr = "US"
        kind = _BINARY.get(vr)
        if kind is not None:
            size = struct.calcsize(kind)
            count = len(value) // size
            if not count or len(value) % size or count > 16:
                return []
            order = "<" if isinstance(found, RawDataElement) and found.is_little_endian else ">"
            binary = [float(number) for number in struct.unpack(f"{order}{count}{kind}", value)]
            return binary if all(map(math.isfinite, binary)) else []
        parsed = [_number(part) for part in texts(dataset, keyword)]
    elif isinstance(value, (list, tuple, MultiValue)):
        parsed = [_number(part) for part in value]
    else:
        parsed = [_number(value)]
    return [] if None in parsed else [number for number in parsed if number is not None]


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; [] where it is absent or broken."""
    if element(dataset, keyword) is None:
        return []
    try:
        with silenced():
            value = dataset[tag(keyword)].value
            return list(value) if isinstance(value, DicomSequence) else []
    except (*PARSE_ERRORS, OSError):  # the bytes are in memory, so no disk has failed
        return []


def functional_groups(dataset: Dataset, macro: str, frame: int | None = None) -> Iterator[Dataset]:
    """Where an attribute of one frame may stand: per-frame group, shared group, dataset (PS3.3 C.7.6.16).

    Args:
        dataset: a whole dataset.
        macro: the keyword of the functional group, as `PixelMeasuresSequence`.
        frame: which frame, from 0; None looks at what all frames share.
    """
    if frame is not None:
        for group in items(dataset, "PerFrameFunctionalGroupsSequence")[frame : frame + 1]:
            yield from items(group, macro)[:1]
    for group in items(dataset, "SharedFunctionalGroupsSequence")[:1]:
        yield from items(group, macro)[:1]
    yield dataset


def identifier(dataset: Dataset, keyword: str) -> str | None:
    """An identifier as text, the same whatever character set the file is written in; None where it is empty.

    A value that its SpecificCharacterSet cannot decode is taken as UTF-8, then as Latin-1, so that it is never lost.
    """
    found = element(dataset, keyword)
    value: Any = None if found is None else found.value
    if isinstance(value, bytes):
        value = _decoded(value, texts(dataset, "SpecificCharacterSet"))
    elif isinstance(value, (list, tuple, MultiValue)):
        value = "\\".join(str(part) for part in value)
    if not isinstance(value, str):
        return None
    return unicodedata.normalize("NFC", value).strip(" \0\t\r\n") or None


def _decoded(value: bytes, character_sets: list[str]) -> str:
    escaped = b"\x1b" in value
    if value.isascii() and not escaped:
        return value.decode("ascii")
    encodings = [python_encoding[name] for name in character_sets if name in python_encoding]
    if escaped and encodings:
        try:
            with silenced():
                decoded = decode_bytes(value, encodings, set())
            if "\ufffd" not in decoded and "\x1b" not in decoded:
                return decoded
        except PARSE_ERRORS:
            pass  # the ways below take any bytes
    for encoding in [*encodings[:1], "utf-8"]:
        try:
            return value.decode(encoding)
        except (UnicodeError, LookupError):
            continue
    return value.decode("latin-1")


def _number(value: Any) -> float | None:
    if isinstance(value, str) and type(value) is str:
        number = float(value) if _NUMBER.fullmatch(value) else math.nan
    elif isinstance(value, bool) or not isinstance(value, (int, float, pydicom.valuerep.DSdecimal)):
        return None
    else:
        try:
            number = float(value)
        except OverflowError:
            return None
    return number if math.isfinite(number) else None
