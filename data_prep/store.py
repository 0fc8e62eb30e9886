"""Where the shards of a dataset go: a folder, or an object store that fsspec knows by its URL.

A file appears under its name whole or not at all: in a folder by a rename, in an object store by the end of its upload.
"""

from __future__ import annotations

import contextlib
import os
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
        # A name of its own, so that a worker that outlives its killed parent never meets its successor's.
        folder = self.spare / secrets.token_hex(8)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # a leftover is removed with `spare`

    def add(self, file: Path, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
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
    """An fsspec URL such as `s3://bucket/folder`; credentials and endpoint are fsspec's own settings."""

    url: str

    def _system(self) -> tuple[Any, str]:
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url} cannot be opened: {error} (S3 needs medpretrain[s3])") from None
        # Listings are remembered by some systems; another process may have written since.
        system.invalidate_cache()
        return system, path.rstrip("/")

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="medpretrain-") as folder:
            yield Path(folder)

    def add(self, file: Path, name: str) -> None:
        system, path = self._system()
        size = file.stat().st_size
        system.put_file(str(file), f"{path}/{name}")
        if self.size(name) != size:
            raise WorkFailed(f"{self.url}/{name}: the upload did not arrive whole")
        file.unlink()

    def size(self, name: str) -> int | None:
        system, path = self._system()
        try:
            return int(system.info(f"{path}/{name}")["size"])
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        system, path = self._system()
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(f"{path}/{name}")

    def names(self) -> list[str]:
        system, path = self._system()
        try:
            found = system.find(path)
        except FileNotFoundError:
            return []
        return sorted(str(name).removeprefix(path).lstrip("/") for name in found)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        system, path = self._system()
        with tempfile.TemporaryDirectory(prefix="medpretrain-") as folder:
            file = Path(folder) / name.rpartition("/")[2]
            system.get_file(f"{path}/{name}", str(file))
            yield file


def is_url(out: str | Path) -> bool:
    """Whether OUT is an fsspec URL and not a path."""
    return "://" in str(out)


def open_store(out: str | Path) -> Store:
    """The store of a finished dataset, for reading."""
    return UrlStore(str(out)) if is_url(out) else FolderStore(Path(out), Path(out))


def folder_to_disk(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
