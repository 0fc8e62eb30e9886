"""A folder that appears whole or not at all, with its private companion beside it.

Everything is written into the hidden sibling `.OUT.partial` and renamed at the end. A run that was killed leaves that
folder behind, unlocked; the next run with the same OUT removes it, or finishes what a kill between two renames left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from data_prep.dataset import INDEX, INFO, QUARANTINE, SHARDS, read_info
from data_prep.errors import UserError

LOCK = "lock"
PENDING = "pending"  # in OUT.private until OUT is there: the SHA-256 of the dataset.json it belongs to
LINKS = "sources.parquet"


class Staging:
    """A context that owns `.OUT.partial`; leaving it without `commit` removes all that was written.

    Attributes:
        out: the folder to appear.
        folder: where to write the dataset.
        private: where to write what must not go with it; becomes `OUT.private`, readable by the owner alone.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        """Check that OUT may be written.

        Raises:
            UserError: OUT or OUT.private exists and is not ours, or `overwrite` is not given, or another run is at it.
        """
        self.out = Path(os.path.abspath(out))
        self._hidden = self._sibling(".partial")
        self._old = self._sibling(".old")
        self._old_private = self._sibling(".private.old")
        self.final_private = self.out.with_name(self.out.name + ".private")
        # A name of its own, so that a worker that outlives its killed parent cannot write into the next run.
        run = secrets.token_hex(4)
        self.folder = self._hidden / f"dataset-{run}"
        self.private = self._hidden / f"private-{run}"
        self._overwrite = overwrite
        self._lock = -1

    def _sibling(self, ending: str) -> Path:
        return self.out.with_name(f".{self.out.name}{ending}")

    def __enter__(self) -> Staging:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        with contextlib.ExitStack() as undo:
            undo.callback(self._release)
            self._finish_killed_commit()
            self._refuse_foreign()
            self._clear()
            (self.folder / SHARDS).mkdir(parents=True)
            self.private.mkdir(mode=0o700)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_killed_commit()  # undoes a commit that failed half way
        self._release()

    def _take_lock(self) -> None:
        """Own `.OUT.partial`, new or left by a killed run; the kernel drops the lock of a killed process."""
        if self._hidden.exists() and not (self._hidden / LOCK).is_file() and any(self._hidden.iterdir()):
            raise UserError(f"{self._hidden} is in the way and was not made by medpretrain")
        self._hidden.mkdir(exist_ok=True)
        self._lock = os.open(self._hidden / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._lock).st_nlink:  # the other run ended just now and took the file along
                raise BlockingIOError
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another run is writing {self.out}") from None
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"{self._hidden / LOCK} cannot be locked on this file system: {error.strerror}") from None

    def _clear(self) -> None:
        for left in self._hidden.iterdir():
            if left.name != LOCK:
                shutil.rmtree(left)

    def _release(self) -> None:
        """Remove the hidden folder, the lock last, so that what a kill leaves here is always recognised."""
        self._clear()
        (self._hidden / LOCK).unlink()
        self._hidden.rmdir()
        os.close(self._lock)

    def _refuse_foreign(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            try:
                info, _ = read_info(self.out)
            except UserError as error:
                raise UserError(f"{self.out} exists and will not be overwritten: {error}") from None
            strays = stray_files(self.out, [shard.name for shard in info.shards])
            if strays:
                raise UserError(f"{self.out} exists and will not be overwritten: it also holds {strays[0]}")
            if not self._overwrite:
                raise UserError(f"{self.out} is a prepared dataset already; --overwrite replaces it")
        if self.final_private.exists():
            if not self.final_private.is_dir() or set(os.listdir(self.final_private)) - {LINKS}:
                raise UserError(f"{self.final_private} is in the way and was not made by medpretrain")
            if not self._overwrite:
                raise UserError(f"{self.final_private} holds the link table of an earlier run; --overwrite replaces it")

    def commit(self) -> None:
        """Make OUT and OUT.private visible, each by one rename; what stood there before is removed last."""
        (self.private / PENDING).write_text(_identity(self.folder))
        if self.final_private.exists():
            self.final_private.rename(self._old_private)
        self.private.rename(self.final_private)
        if self.out.exists():
            self.out.rename(self._old)
        self.folder.rename(self.out)
        folder = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._finish_killed_commit()

    def _finish_killed_commit(self) -> None:
        """Go forward if the new OUT is in its place, else back to the old one. Does nothing after a clean end."""
        pending = self.final_private / PENDING
        landed = pending.is_file() and (self.out / INFO).is_file() and _identity(self.out) == pending.read_text()
        if landed:
            for old in (self._old, self._old_private):
                if old.exists():
                    shutil.rmtree(old)
            pending.unlink()
            return
        if self._old.exists() and not self.out.exists():
            self._old.rename(self.out)
        if pending.is_file():
            shutil.rmtree(self.final_private)
        if self._old_private.exists() and not self.final_private.exists():
            self._old_private.rename(self.final_private)


def _identity(folder: Path) -> str:
    return hashlib.sha256((folder / INFO).read_bytes()).hexdigest()


def stray_files(folder: Path, shards: list[str]) -> list[str]:
    """What lies in a dataset's folder and does not belong to it, as relative paths."""
    expected = {INFO, INDEX, QUARANTINE, SHARDS}
    expected |= {f"{SHARDS}/{name}" for name in shards}
    expected |= {f"{SHARDS}/{name.removesuffix('.tar')}.idx" for name in shards}
    found = os.listdir(folder)
    if (folder / SHARDS).is_dir():
        found += [f"{SHARDS}/{name}" for name in os.listdir(folder / SHARDS)]
    return sorted(set(found) - expected)
