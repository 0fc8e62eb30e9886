"""Checkpoints in an object store that fsspec knows by its URL.

An object store has no rename: files, under names that no other save uses, are nothing until `manifest.json` names them,
and that is put last, in one request. There is no lock: a prefix belongs to one run.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from data_prep.errors import WorkFailed
from data_prep.store import UrlStore
from medpretrain.checkpoints.manifest import MANIFEST, CheckpointError, Manifest, parse
from medpretrain.checkpoints.target import ASIDE, NAME, Draft, Reader, by_step, check_sizes, known_step

_DATA = re.compile(r"[0-9a-f]{8}-rank-\d{5,}-of-\d{5,}\.safetensors")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreTarget:
    """A prefix of an object store; credentials and endpoint are fsspec's own settings.

    Whatever goes wrong there, but for an object that is not there, is WorkFailed: a store that cannot be reached has no
    damaged checkpoints.
    """

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    @property
    def _store(self) -> UrlStore:
        return UrlStore(self.url)

    @contextlib.contextmanager
    def _system(self) -> Iterator[tuple[Any, str]]:
        """The file system, and the prefix as it knows it; its errors are WorkFailed, with one line."""
        system, path = fsspec.core.url_to_fs(self.url)
        try:
            yield system, path.rstrip("/")
        except (CheckpointError, WorkFailed, FileNotFoundError):
            raise
        except Exception as error:  # every system has errors of its own
            said = " ".join(str(error).split())[:300]
            raise WorkFailed(f"{self.url}: {said or type(error).__name__}") from error

    def _files(self) -> dict[str, set[str]]:
        """What lies below each checkpoint's name, committed or not."""
        found: dict[str, set[str]] = {}
        for path in self._store.names():
            name, _, file = path.partition("/")
            if NAME.fullmatch(name) and file:
                found.setdefault(name, set()).add(file)
        return found

    def names(self) -> list[str]:
        return by_step(name for name, files in self._files().items() if MANIFEST in files)

    def place(self, name: str, file: str = "") -> str:
        return f"{self.url}/{name}/{file}".rstrip("/")

    def manifest(self, name: str) -> bytes:
        try:
            with self._system() as (system, path):
                data: bytes = system.cat_file(f"{path}/{name}/{MANIFEST}")
                return data
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no checkpoint at {self.place(name)}") from error

    def check_files(self, name: str, manifest: Manifest) -> None:
        # Other files may be there: those of a save that was killed.
        sizes = {file: self._store.size(f"{name}/{file}") for file in manifest.files}
        there = {file: size for file, size in sizes.items() if size is not None}
        check_sizes(self.place(name), there, manifest)

    @contextlib.contextmanager
    def reader(self, name: str, file: str) -> Iterator[Reader]:
        yield _StoreReader(self, f"{name}/{file}")

    def read(self, file: str, start: int, into: memoryview) -> None:
        try:
            with self._system() as (system, path):
                data = system.cat_file(f"{path}/{file}", start=start, end=start + len(into))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.url}/{file} is missing") from error
        if len(data) != len(into):
            raise CheckpointError(f"{self.url}/{file} ends at byte {start + len(data)}")
        into[:] = data

    def begin(self, step: int, size: int, files: int) -> Draft:
        for name, there in self._files().items():
            self._sweep(name, there)
        name, token = f"step-{step:08d}", secrets.token_hex(4)
        return Draft(name, f"{name}/{token}-", f"{token}-")

    def _sweep(self, name: str, there: set[str]) -> None:
        """Remove the files of `name` that saves made and no manifest names; nothing where one cannot be read."""
        named: set[str] = set()
        for file in there:
            if file == MANIFEST:
                try:
                    named |= parse(self.manifest(name), known_step(name), "").files.keys()
                except CheckpointError:
                    return
            elif file.startswith(ASIDE):
                return
        for file in sorted(there - named):
            if _DATA.fullmatch(file):
                self._store.remove(f"{name}/{file}")

    @contextlib.contextmanager
    def create(self, draft: Draft, file: str) -> Iterator[BinaryIO]:
        name = f"{draft.name}/{file}"
        with self._system() as (system, path):
            opened = system.open(f"{path}/{name}", "wb")
            try:
                yield opened
            except BaseException:
                # To close it would end the upload as if it were whole. Not every system can give one up; the name is
                # this save's own, so that what stays is in no manifest.
                with contextlib.suppress(Exception):
                    opened.discard()
                with contextlib.suppress(AttributeError):
                    opened.closed = True  # or it is closed after all when it is collected
                raise
            opened.close()

    def commit(self, draft: Draft, manifest: Manifest) -> None:
        self.check_files(draft.name, manifest)
        with self._system() as (system, path):
            system.pipe_file(f"{path}/{draft.name}/{MANIFEST}", manifest.to_bytes())
        try:
            self._sweep(draft.name, self._files().get(draft.name, set()))  # what an earlier save of this step left
        except (WorkFailed, OSError) as error:
            _log.warning("files of an earlier save could not be removed: %s", error)

    def abandon(self, draft: Draft) -> None:
        try:
            # Not what the manifest names: a request that failed here may have been heard there.
            self._sweep(draft.name, self._files().get(draft.name, set()))
        except (WorkFailed, OSError) as error:
            _log.warning("files of a save that failed are left: %s", error)

    def end(self, draft: Draft) -> None:
        """Nothing is held."""

    def remove(self, name: str) -> None:
        files = self._files().get(name, set())
        named = parse(self.manifest(name), known_step(name), self.place(name, MANIFEST)).files
        self._store.remove(f"{name}/{MANIFEST}")
        for file in sorted(files & named.keys()):
            self._store.remove(f"{name}/{file}")

    def put_aside(self, name: str) -> str:
        """Its manifest gets another name, which takes it out of sight; the large files stay where they are."""
        other = f"{name}/{ASIDE}-{time.time_ns()}-{MANIFEST}"
        data = self.manifest(name)
        with self._system() as (system, path):
            system.pipe_file(f"{path}/{other}", data)
        self._store.remove(f"{name}/{MANIFEST}")
        return f"{self.url}/{other}"


@dataclass(frozen=True)
class _StoreReader:
    target: StoreTarget
    file: str

    def read(self, start: int, into: memoryview) -> None:
        self.target.read(self.file, start, into)
