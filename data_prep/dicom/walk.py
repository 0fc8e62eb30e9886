"""Every file of a PACS export by name: folders, zip archives, DICOMDIR; and the bytes behind a name.

A name is relative to the export, as the file system has it, in bytes: `a/b.dcm`, or `a/b.zip` NUL `member` for what
lies in an archive. Names are private: they often say who the patient is.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from lzma import LZMAError
from pathlib import Path
from typing import BinaryIO

from data_prep.dicom.header import items, read_header, texts
from data_prep.errors import UserError
from data_prep.quarantine import Rejected

MAX_BYTES = 1 << 31
OPEN_ARCHIVES = 8
SEPARATOR = b"\0"
_ZIP = b"PK\3\4"
# What zipfile raises while it opens a damaged archive.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, EOFError, LookupError, NotImplementedError, OSError, OverflowError, ValueError)
_READ_ERRORS = (*_ARCHIVE_ERRORS, zlib.error, LZMAError)
Places = tuple[tuple[int, int], ...]


def walk(root: Path) -> Iterator[bytes]:
    """The names of all files, in each folder in the order of their bytes; hidden ones are left out.

    Links to folders are followed, but not in circles. What a DICOMDIR lists and the disk does not have is named too,
    right after the DICOMDIR, so that its absence is recorded. A member's name that an archive has twice counts once.

    Args:
        root: the export: a folder, a zip archive, a DICOMDIR (then only what it lists) or a single file.

    Raises:
        UserError: nothing there, or a folder that cannot be read.
    """
    if root.is_dir():
        try:
            yield from _folder(os.fsencode(root), b"", ())
        except OSError as error:
            raise UserError(
                f"{root}, or a folder in it, cannot be read: {error.strerror}; its name may be a patient's, so look "
                f"for it yourself: find {root} -type d ! -readable"
            ) from None
    elif not root.exists():
        raise UserError(f"{root} does not exist")
    elif _is_dicomdir(os.fsencode(root.name)):
        folder = os.fsencode(root.parent)
        yield from dict.fromkeys(name for name, _ in _listed(folder, os.fsencode(root)))
    else:
        yield from _file(os.fsencode(root), os.fsencode(root.name))


def read(root: Path, name: bytes) -> bytes:
    """The bytes of a file that `walk(root)` named.

    Raises:
        Rejected: `missing`, `unreadable`, `file_too_large`; in an archive `archive_encrypted`, `archive_nested`,
            `archive_unreadable`, `corrupt` (a wrong checksum).
    """
    with opened(root, name) as file:
        try:
            return file.read()
        except _READ_ERRORS as error:
            raise _reason(error, name) from None


def opened(root: Path, name: bytes) -> BinaryIO:
    """The file that `walk(root)` named, open for reading and seekable; for headers, where `read` would read too much.

    Raises:
        Rejected: as `read`; but the checksum of a member is only looked at by `read`.
    """
    path, separator, member = name.partition(SEPARATOR)
    base = root if root.is_dir() else root.parent
    full = os.path.join(os.fsencode(base), path)
    try:
        file = _member(full, member) if separator else _plain(full)
        start = file.read(132)
        file.seek(0)
    except _READ_ERRORS as error:
        raise _reason(error, name) from None
    if start.startswith(_ZIP) and start[128:] != b"DICM":
        file.close()
        raise Rejected("archive_nested" if separator else "archive_unreadable")
    return file


def shown(name: bytes) -> str:
    r"""A name as text for private tables.

    >>> shown(b"a/b.zip\0c.dcm"), shown(b"M\xfcller")
    ('a/b.zip!/c.dcm', 'M\\xfcller')
    """
    return name.replace(SEPARATOR, b"!/").decode("utf-8", "backslashreplace")


def _plain(path: bytes) -> BinaryIO:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Rejected("unreadable")
    if status.st_size > MAX_BYTES:
        raise Rejected("file_too_large")
    return open(path, "rb")


def _member(path: bytes, member: bytes) -> BinaryIO:
    archive = _archive(path, os.getpid())
    try:
        entry = archive.getinfo(member.decode("utf-8", "surrogateescape"))
    except KeyError:
        raise Rejected("missing") from None
    if entry.flag_bits & 1:
        raise Rejected("archive_encrypted")
    if entry.file_size > MAX_BYTES:
        raise Rejected("file_too_large")
    return archive.open(entry)  # type: ignore[return-value]


@lru_cache(OPEN_ARCHIVES)
def _archive(path: bytes, process: int) -> zipfile.ZipFile:
    """An open archive; one for each process, since a forked one would share the place in the file."""
    return zipfile.ZipFile(os.fsdecode(path))


def _reason(error: Exception, name: bytes) -> Rejected:
    if isinstance(error, FileNotFoundError):
        return Rejected("missing")
    if SEPARATOR not in name:
        return Rejected("unreadable")
    if isinstance(error, NotImplementedError):
        return Rejected("archive_unreadable")
    if isinstance(error, OSError) and error.errno is not None:
        return Rejected("unreadable")
    return Rejected("corrupt")


def _folder(path: bytes, prefix: bytes, above: Places) -> Iterator[bytes]:
    status = os.stat(path)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(path) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(b".")), key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        # A link in a circle is no folder, and no reason to stop.
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            yield from _folder(entry.path, name + b"/", (*above, here))
        else:
            yield from _file(entry.path, name)
            if _is_dicomdir(entry.name) and os.path.isfile(entry.path):
                yield from dict.fromkeys(prefix + missing for missing, there in _listed(path, entry.path) if not there)


def _file(path: bytes, name: bytes) -> Iterator[bytes]:
    """A file's own name, or those of its members where it is an archive that opens."""
    members = _members(path)
    if members is None:
        yield name
    else:
        for member in members:
            yield name + SEPARATOR + member


def _members(path: bytes) -> list[bytes] | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            start = file.read(132)
            # A preamble may say PK, to be read as an archive too; the DICOM file goes first.
            if not start.startswith(_ZIP) or start[128:] == b"DICM" or not zipfile.is_zipfile(file):
                return None
        with zipfile.ZipFile(os.fsdecode(path)) as archive:
            names = {entry.filename for entry in archive.infolist() if not entry.is_dir()}
    except _ARCHIVE_ERRORS:
        return None  # named as a file, and set aside when it is read
    visible = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    return sorted(name.encode("utf-8", "surrogateescape") for name in visible if not name.startswith("__MACOSX/"))


def _is_dicomdir(name: bytes) -> bool:
    return name.upper() == b"DICOMDIR"


def _listed(folder: bytes, path: bytes) -> Iterator[tuple[bytes, bool]]:
    """What a DICOMDIR lists, relative to its folder, and whether it is there; () where the DICOMDIR is broken.

    Its names are in capitals (PS3.10 8.2); copies often have them in small letters, so the case does not count. A name
    that leads out of the folder is no file of the export.
    """
    try:
        with open(path, "rb") as file:
            directory = read_header(file)
    except (OSError, Rejected):
        return
    folders: dict[bytes, dict[bytes, bytes]] = {}
    for record in items(directory, "DirectoryRecordSequence"):
        parts = [os.fsencode(part) for part in texts(record, "ReferencedFileID")]
        if not parts or any(part in (b"", b".", b"..") or b"/" in part or b"\0" in part for part in parts):
            continue
        found: list[bytes] = []
        for part in parts:
            inside = b"/".join(found)
            if inside not in folders:
                folders[inside] = _by_capitals(os.path.join(folder, inside))
            actual = folders[inside].get(part.upper())
            if actual is None:
                break
            found.append(actual)
        there = len(found) == len(parts)
        yield (b"/".join(found if there else parts), there)


def _by_capitals(folder: bytes) -> dict[bytes, bytes]:
    try:
        return {name.upper(): name for name in sorted(os.listdir(folder), reverse=True)}
    except OSError:
        return {}
