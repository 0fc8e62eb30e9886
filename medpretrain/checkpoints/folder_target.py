"""Checkpoints in a folder that all processes see: each appears by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.store import folder_to_disk
from medpretrain.checkpoints.manifest import MANIFEST, CheckpointError, Manifest
from medpretrain.checkpoints.target import ASIDE, Draft, Reader, by_step, check_sizes, write_all

_TEMPORARY = ".tmp-"
_SLACK = 1 << 20  # bytes, for the file system's own

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderTarget:
    """A folder that all processes see."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return by_step(os.listdir(self.folder) if self.folder.is_dir() else [])

    def place(self, name: str, file: str = "") -> str:
        return str(self.folder / name / file)

    def manifest(self, name: str) -> bytes:
        file = self.folder / name / MANIFEST
        try:
            return file.read_bytes()
        except FileNotFoundError as error:
            there = (self.folder / name).is_dir()
            raise CheckpointError(
                f"{file} is missing" if there else f"there is no checkpoint at {self.folder / name}"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error

    def check_files(self, name: str, manifest: Manifest) -> None:
        path = self.folder / name
        try:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        for extra in sorted(found.keys() - manifest.files.keys() - {MANIFEST}):
            raise CheckpointError(f"{path / extra} is no part of the checkpoint")
        for entry, status in found.items():
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path / entry} is not a plain file")
        check_sizes(self.place(name), {entry: status.st_size for entry, status in found.items()}, manifest)

    @contextlib.contextmanager
    def reader(self, name: str, file: str) -> Iterator[Reader]:
        path = self.folder / name / file
        try:
            opened = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        with opened:
            yield _FileReader(path, opened.fileno())

    def begin(self, step: int, size: int, files: int) -> Draft:
        self.folder.mkdir(parents=True, exist_ok=True)
        folder_to_disk(self.folder.parent)
        lock = os.open(self.folder / ".writer", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):  # nobody writes: the lock is ours
                _delete(leftover)
            _check_room(self.folder, size, files)
            name = f"step-{step:08d}"
            hidden = _hidden(name)
            (self.folder / hidden).mkdir()
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(f"another process is writing a checkpoint in {self.folder}") from None
        except BaseException:
            os.close(lock)
            raise
        return Draft(name, f"{hidden}/", lock=lock)

    @contextlib.contextmanager
    def create(self, draft: Draft, file: str) -> Iterator[BinaryIO]:
        if not (self.folder / draft.prefix).is_dir():
            raise CheckpointError(f"{self.folder} is not the same folder for every process; it must be shared")
        with open(self.folder / f"{draft.prefix}{file}", "xb", buffering=0) as opened:
            yield opened  # type: ignore[misc]
            os.fsync(opened.fileno())

    def commit(self, draft: Draft, manifest: Manifest) -> None:
        hidden, final = self.folder / draft.prefix, self.folder / draft.name
        self.check_files(hidden.name, manifest)
        with self.create(draft, MANIFEST) as file:
            write_all(file, memoryview(manifest.to_bytes()))
        folder_to_disk(hidden)
        if final.exists():
            replaced = final.with_name(f"{final.name}.old")
            if replaced.exists():
                self.remove(replaced.name)
            os.rename(final, replaced)
        os.rename(hidden, final)
        folder_to_disk(self.folder)

    def abandon(self, draft: Draft) -> None:
        hidden = self.folder / draft.prefix
        if hidden.exists():
            _delete(hidden)

    def end(self, draft: Draft) -> None:
        if draft.lock is not None:
            os.close(draft.lock)
            draft.lock = None

    def remove(self, name: str) -> None:
        hidden = self.folder / _hidden(name)
        os.rename(self.folder / name, hidden)
        _delete(hidden)

    def put_aside(self, name: str) -> str:
        aside = self.folder / ASIDE
        aside.mkdir(exist_ok=True)
        number = 1
        while (aside / f"{name}-{number}").exists():
            number += 1
        os.rename(self.folder / name, aside / f"{name}-{number}")
        return str(aside / f"{name}-{number}")


@dataclass(frozen=True)
class _FileReader:
    path: Path
    descriptor: int

    def read(self, start: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self.descriptor, [into[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} ends at byte {start + done}")
            done += count


def _check_room(folder: Path, size: int, files: int) -> None:
    """Before anything is written: a disk that is full hurts others too.

    Raises:
        CheckpointError: too few bytes or inodes are free. Quotas are not seen here; they show when it is written.
    """
    disk = os.statvfs(folder)
    free, needed = disk.f_bavail * disk.f_frsize, size + _SLACK
    if free < needed:
        raise CheckpointError(f"{folder} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed")
    if disk.f_files and disk.f_favail < files + 2:  # some file systems make inodes as needed and count none
        raise CheckpointError(f"{folder} has {disk.f_favail} inodes free and {files + 2} are needed")


def _hidden(name: str) -> str:
    return f"{_TEMPORARY}{name}-{secrets.token_hex(4)}"


def _delete(hidden: Path) -> None:
    """What stays (an open file on NFS, say) is tried again at the next save; it must not stop this one."""
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("a temporary folder could not be deleted: %s", error)
