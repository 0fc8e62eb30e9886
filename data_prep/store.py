"""Where the shards of a dataset go: a folder, or an object store that fsspec knows by its URL.

A file appears under its name whole or not at all: in a folder by a rename, in an object store by the end of its upload.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec

from data_prep.errors import UserError, WorkFailed


class Store(Protocol):
    """Files by name, such as `shards/train-00000.tar`. Pickles, so that a worker elsewhere can write too."""

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A new folder to write into, from which `add` costs least; gone afterwards."""

    def add(self, file: Path, name: str) -> None:
        """Let a finished local file appear as `name`, in place of what stood there; the local file is used up."""

    def size(self, name: str) -> int | None:
        """Bytes, or None where there is no such file."""

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    def names(self) -> list[str]:
        """Every file there is."""

    def local(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """The file's content as a local file, to read only."""


@dataclass(frozen=True)
class FolderStore:
    """A local or shared folder; `spare` is a folder on the same file system for files in the making."""

    folder: Path
    spare: Path

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        if not self.spare.parent.is_dir():
            raise WorkFailed(f"{self.spare.parent} is not there: every worker must see the folder of OUT")
        # A name of its own, so that a worker that outlives its killed parent never meets its successor's.
        folder = self.spare / secrets.token_hex(8)
        try:
            folder.mkdir(parents=True)
            with _names_full_disk(folder.parent):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # a leftover is removed with `spare`

    def add(self, file: Path, name: str) -> None:
        target = self.folder / name
        # Not its parents: a worker that comes late must not bring a finished run's folder back.
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
        folder_to_disk(target.parent)

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        return sorted(
            os.path.relpath(os.path.join(where, name), self.folder)
            for where, _, files in os.walk(self.folder)
            for name in files
        )

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self.folder / name


@dataclass(frozen=True)
class UrlStore:
    """An fsspec URL such as `s3://bucket/folder`; credentials and endpoint are fsspec's own settings.

    Whatever goes wrong there is `WorkFailed` with one line: every system has errors of its own.
    """

    url: str

    @contextlib.contextmanager
    def _system(self) -> Iterator[tuple[Any, str]]:
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url} cannot be opened: {error} (S3 needs medpretrain[s3])") from None
        try:
            # Listings are remembered by some systems; another process may have written since.
            system.invalidate_cache()
            yield system, path.rstrip("/")
        except (UserError, WorkFailed):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # a full local disk is no fault of the store
            said = " ".join(str(error).split())[:300]
            raise WorkFailed(f"{self.url}: {said or type(error).__name__}") from error

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        spare = Path(tempfile.gettempdir())
        with _names_full_disk(spare), tempfile.TemporaryDirectory(prefix="medpretrain-", dir=spare) as folder:
            yield Path(folder)

    def add(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        with self._system() as (system, path):
            system.put_file(str(file), f"{path}/{name}")
        if self.size(name) != size:
            raise WorkFailed(f"{self.url}/{name}: the upload did not arrive whole")
        file.unlink()

    def size(self, name: str) -> int | None:
        with self._system() as (system, path):
            try:
                return int(system.info(f"{path}/{name}")["size"])
            except FileNotFoundError:
                return None

    def remove(self, name: str) -> None:
        with self._system() as (system, path), contextlib.suppress(FileNotFoundError):
            system.rm_file(f"{path}/{name}")

    def names(self) -> list[str]:
        with self._system() as (system, path):
            try:
                found = system.find(path)
            except FileNotFoundError:
                bucket = path.partition("/")[0]
                if bucket and not system.exists(bucket):
                    raise
                return []
        return sorted(str(name).removeprefix(path).lstrip("/") for name in found)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with self.scratch() as folder:
            file = folder / name.rpartition("/")[2]
            with self._system() as (system, path):
                system.get_file(f"{path}/{name}", str(file))
            yield file


def is_url(out: str | Path) -> bool:
    """Whether OUT is an fsspec URL and not a path.

    Raises:
        UserError: a URL that would not do: one of local files, with a password, or cut short by `Path`.
    """
    text = str(out)
    if isinstance(out, Path) and re.match(r"[a-z0-9+]{2,}:/", text):
        raise UserError(f"{text}: a URL must be given as text, not as a Path, which drops a slash")
    if "://" not in text:
        return False
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        raise UserError(f"{text}: give a local folder as a path, not as a URL")
    if "@" in rest.partition("/")[0]:
        raise UserError(f"{protocol}://...: a name or password must not stand in the URL; use the settings of fsspec")
    return True


def open_store(out: str | Path) -> Store:
    """The store of a finished dataset, for reading."""
    return UrlStore(str(out)) if is_url(out) else FolderStore(Path(out), Path(out))


@contextlib.contextmanager
def _names_full_disk(folder: Path) -> Iterator[None]:
    """Say which disk is full: the error of a write does not."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(folder, error) from None
        raise


FULL = (errno.ENOSPC, errno.EDQUOT)


def no_space(folder: Path, error: OSError) -> WorkFailed:
    """What to say of a full disk: where it is mounted, and that nothing is lost."""
    disk = next(place for place in (folder, *folder.parents) if os.path.ismount(place))
    reason = os.strerror(error.errno or 0)
    return WorkFailed(
        f"{folder}: {reason} (the disk is mounted at {disk}); what is done is kept: make room and give the same "
        "command again"
    )


def folder_to_disk(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
