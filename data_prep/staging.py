"""A dataset that appears whole or not at all, and a run that goes on where it was killed.

Until the end everything lies in a hidden folder beside the result: the plan, a record a finished shard, and (for a
local OUT) the shards themselves. It stays after a kill, a full disk or Ctrl-C, and the same command goes on there. What
must not leave with the dataset (which file became which sample) becomes a folder of its own, OUT.private.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.dataset import INDEX, INFO, QUARANTINE, SHARDS, to_disk
from data_prep.dataset_info import DatasetInfo, parse_info
from data_prep.errors import UserError, WorkFailed
from data_prep.store import FolderStore, Store, UrlStore, folder_to_disk, is_url, open_store

LOCK = "lock"
LANDED = "landed"  # in the hidden folder once the commit is done
PENDING = "pending"  # in OUT.private until OUT is there: OUT's URL and the SHA-256 of its dataset.json
PLAN, RECORDS = "plan.json", "records"
LINKS, AUDIT, REVIEW = "sources.parquet", "audit.jsonl", "review.html"
_PATIENCE = 10.0  # seconds in which a part gets its lock while another ends
_SHARD_FILE = re.compile(rf"{SHARDS}/[a-z0-9_]+-[0-9]{{5,}}\.(tar|idx)")


class Staging:
    """The hidden folder of a run, its lock, and the commit.

    Attributes:
        out: where the dataset will be, a folder or a URL.
        state: plan and records; on the machine, or on a file system that all parts of the run share.
        dataset: a folder for the dataset's files but, with a URL, its shards.
        private: a folder for what becomes OUT.private.
        final_private: OUT.private.
        store: where shards go.
    """

    def __init__(self, out: str | Path, private: Path | None, overwrite: bool, append: bool) -> None:
        """Nothing is touched yet.

        Raises:
            UserError: a URL without a private folder, or options that exclude each other.
        """
        self.remote = goes_to_url(out, private, overwrite, append)
        if private is not None:  # with a URL, and only there
            self.out = str(out).rstrip("/")
            self.final_private = Path(os.path.realpath(private))
        else:
            folder = Path(os.path.realpath(out))  # a link stays, and what it points to is replaced
            if folder.parent == folder or os.path.ismount(folder):
                raise UserError(f"{out} is a mount point, which cannot be renamed; give a folder inside it")
            self.out = str(folder)
            self.final_private = folder.with_name(folder.name + ".private")
        if os.path.islink(self.final_private) or os.path.ismount(self.final_private):
            raise UserError(f"{self.final_private} is a link or a mount point, which would be replaced by a folder")
        beside = self.final_private if self.remote else Path(self.out)
        self._old = beside.with_name(f".{beside.name}.old")  # of OUT; never there with a URL
        self.state = beside.with_name(f".{beside.name}.partial")
        self._old_private = self.final_private.with_name(f".{self.final_private.name}.private.old")
        self.dataset = self.state / "dataset"
        self.private = self.state / "private"
        self._spare = self.state / "scratch"
        self.store: Store = UrlStore(self.out) if self.remote else FolderStore(self.dataset, self._spare)
        self._overwrite = overwrite
        self._append = append
        self._locks: list[int] = []

    # Opening and locking

    @contextlib.contextmanager
    def enter(self, part: tuple[int, int] | None) -> Iterator[None]:
        """Own the run, or one part of it: (1, 8) shares the state with the other seven.

        At the end the hidden folder goes, unless it holds a plan to go on with.

        Raises:
            UserError: another run is at it, or something that is not ours stands in its place.
        """
        self.state.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._own(part)
            with self.alone():
                self._finish_killed_commit()
                if part is None:
                    shutil.rmtree(self._spare, ignore_errors=True)  # what killed workers left takes up room
                self._make_folders()
            yield
        finally:
            self._release()

    def _own(self, part: tuple[int, int] | None) -> None:
        """Make the hidden folder and lock it; a run that ends just now may take it away meanwhile."""
        ends = time.monotonic() + _PATIENCE
        while True:
            try:
                with contextlib.suppress(FileExistsError):
                    self.state.mkdir()
                if self._foreign():
                    raise UserError(f"{self.state} is in the way and was not made by medpretrain")
                self._lock(LOCK, fcntl.LOCK_EX if part is None else fcntl.LOCK_SH)
                break
            except FileNotFoundError:  # taken away just now
                if time.monotonic() > ends:
                    raise
            except BlockingIOError:
                if part is None or time.monotonic() > ends:
                    raise UserError(f"another run is writing {self.out}") from None
                time.sleep(0.1)
        if part is not None:
            try:
                self._lock(f"{LOCK}-{part[0]}-of-{part[1]}", fcntl.LOCK_EX)
            except BlockingIOError:
                raise UserError(f"another run is writing part {part[0]}/{part[1]} of {self.out}") from None

    def _foreign(self) -> bool:
        """Whether the hidden folder is no run's: a run makes its lock first of all and removes it last.

        Looks twice, in this order, since other runs come and go meanwhile.
        """
        if not stat.S_ISDIR(os.lstat(self.state).st_mode):
            return True
        lock = self.state / LOCK
        others = [file for file in self.state.iterdir() if file != lock]
        return not lock.is_file() and any(file.exists() for file in others) and not lock.is_file()

    def _lock(self, name: str, kind: int, wait: bool = False) -> None:
        """Raises BlockingIOError where another holds it, FileNotFoundError where the file was taken away."""
        handle = os.open(self.state / name, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
            if not os.fstat(handle).st_nlink:
                raise FileNotFoundError(self.state / name)
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            raise UserError(f"{self.state / name} cannot be locked on this file system: {error.strerror}") from None
        self._locks.append(handle)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What one part at a time may do; the others wait."""
        before = len(self._locks)
        self._lock(f"{LOCK}-alone", fcntl.LOCK_EX, wait=True)
        try:
            yield
        finally:
            while len(self._locks) > before:
                os.close(self._locks.pop())

    def refuse_other_parts(self) -> None:
        """Before a plan is thrown away.

        Raises:
            UserError: another part is at work with it.
        """
        if not (self.state / PLAN).exists():
            return
        mine = {os.fstat(handle).st_ino for handle in self._locks}
        for lock in self.state.glob(f"{LOCK}-*-of-*"):
            if lock.stat().st_ino in mine:
                continue
            with lock.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{self.out}: other parts are at work with another plan; end them first") from None

    def refuse_foreign(self) -> tuple[DatasetInfo, str] | None:
        """Check that OUT may be written; returns the dataset that is there, and its SHA-256.

        Raises:
            UserError: OUT or OUT.private exists and is not ours, or neither --overwrite nor --append is given.
        """
        there = self.existing()
        if there is not None and not self._overwrite and not self._append:
            raise UserError(f"{self.out} is a prepared dataset already; --overwrite replaces it, --append adds to it")
        if there is None and self._append:
            raise UserError(f"--append: there is no dataset at {self.out}")
        if self.final_private.exists():
            strays = self.final_private.is_dir() and set(os.listdir(self.final_private)) - {LINKS, AUDIT, REVIEW}
            if strays or not self.final_private.is_dir():
                raise UserError(f"{self.final_private} is in the way and was not made by medpretrain")
            if not self._overwrite and not self._append:
                raise UserError(f"{self.final_private} holds the link table of an earlier run; --overwrite replaces it")
        elif self._append:
            raise UserError(f"--append: {self.final_private}, the link table of {self.out}, is missing")
        return there

    def existing(self) -> tuple[DatasetInfo, str] | None:
        """The dataset at OUT and the SHA-256 of its dataset.json.

        Raises:
            UserError: something else is there.
        """
        store = open_store(self.out)
        try:
            names = store.names()
        except WorkFailed as error:
            if isinstance(error.__cause__, (FileNotFoundError, PermissionError)):  # no bucket, no right to list
                raise UserError(str(error)) from None
            raise
        if INFO in names:
            with store.local(INFO) as file:
                raw = file.read_bytes()
            try:
                info = parse_info(raw, f"{self.out}/{INFO}")
            except UserError as error:
                raise UserError(f"{self.out} exists and will not be overwritten: {error}") from None
            strays = stray_files(names, info)
            if self.remote and (self._overwrite or self._append):  # what a killed --append leaves
                strays = [name for name in strays if not _SHARD_FILE.fullmatch(name)]
            if strays:
                raise UserError(f"{self.out} exists and will not be overwritten: it also holds {strays[0]}")
            return info, hashlib.sha256(raw).hexdigest()
        # In an object store, shards without a dataset.json are what a killed run of ours leaves.
        ours = self.remote and (self._overwrite or (self.state / PLAN).exists())
        for name in names:
            if not ours or not (_SHARD_FILE.fullmatch(name) or name in (INDEX, QUARANTINE)):
                raise UserError(f"{self.out} exists and will not be overwritten: it is no dataset and holds {name}")
        if not self.remote and Path(self.out).is_file():
            raise UserError(f"{self.out} exists and will not be overwritten: it is a file")
        return None

    def _make_folders(self) -> None:
        for folder in (self.dataset, self.state / RECORDS):
            folder.mkdir(parents=True, exist_ok=True)
        self.private.mkdir(mode=0o700, exist_ok=True)

    def clear(self) -> None:
        """Forget plan, records and shards in the making."""
        (self.state / PLAN).unlink(missing_ok=True)
        for left in self.state.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif not left.name.startswith(LOCK):
                left.unlink()
        self._make_folders()

    def _release(self) -> None:
        """Give the locks back; without a plan to go on with, the last one out removes the hidden folder."""
        try:
            if self._locks and not (self.state / PLAN).exists():
                with contextlib.suppress(BlockingIOError):  # other parts are still at it
                    fcntl.flock(self._locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.clear()
                    self._remove_state()
        finally:
            while self._locks:
                os.close(self._locks.pop())

    def _remove_state(self) -> None:
        """The lock that keeps others out goes last; whoever waited for it makes the folder anew."""
        for left in self.state.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()
        (self.state / LOCK).unlink()
        with contextlib.suppress(OSError):  # another run is there already
            self.state.rmdir()

    # Commit

    def begin(self) -> None:
        """An object store has no rename: what is to be replaced stops being a dataset before its shards change."""
        if self.remote and self._overwrite:
            self.store.remove(INFO)

    def commit(self) -> None:
        """Make the dataset and OUT.private visible; what stood there before is removed last."""
        (self.private / PENDING).write_text(self._identity(self.dataset / INFO))
        for file in self.private.iterdir():
            os.chmod(file, 0o600)
            to_disk(file)
        if self.final_private.exists():
            self.final_private.rename(self._old_private)
        self.private.rename(self.final_private)
        folder_to_disk(self.final_private.parent)
        if not self.remote:
            out = Path(self.out)
            if out.exists():
                out.rename(self._old)
            self.dataset.rename(out)
            folder_to_disk(out.parent)
        self._finish_killed_commit()

    def _upload(self) -> None:
        """Put the files of the dataset that are not shards; until the last is there, OUT is no dataset."""
        if self._identity_there() != self._identity(self.dataset / INFO):
            self.store.remove(INFO)
            for name in (INDEX, QUARANTINE, INFO):
                copy = self.state / f"{name}.upload"
                shutil.copyfile(self.dataset / name, copy)
                self.store.add(copy, name)
        info = parse_info((self.dataset / INFO).read_bytes(), INFO)
        for name in filter(_SHARD_FILE.fullmatch, stray_files(self.store.names(), info)):
            self.store.remove(name)

    def landed(self) -> bool:
        """Whether a kill came between the last rename of a commit and the end of the run."""
        return (self.state / PLAN).exists() and (self.state / LANDED).exists()

    def _finish_killed_commit(self) -> None:
        """Go forward if the new dataset is in its place, else back to the old one. Does nothing after a clean end.

        With a URL there is no way back, but all that is to be uploaded is still here.
        """
        pending = self.final_private / PENDING
        if pending.is_file() and self.remote and (self.dataset / INFO).is_file():
            if pending.read_text() != self._identity(self.dataset / INFO):
                raise UserError(
                    f"{self.final_private} belongs to a run for another OUT that is not ended: give its command again "
                    "first, or another --private"
                )
            self._upload()
        if pending.is_file() and self._identity_there() == pending.read_text():
            for old in (self._old, self._old_private):
                if old.exists():
                    shutil.rmtree(old)
            (self.state / LANDED).touch()
            pending.unlink()
            return
        out = Path(self.out)
        if self._old.exists() and not out.exists():
            self._old.rename(out)
        if pending.is_file():
            self.final_private.rename(self.private)
            (self.private / PENDING).unlink()
        if self._old_private.exists() and not self.final_private.exists():
            self._old_private.rename(self.final_private)

    def _identity_there(self) -> str | None:
        store = open_store(self.out)
        if store.size(INFO) is None:
            return None
        with store.local(INFO) as file:
            return self._identity(file)

    def _identity(self, info: Path) -> str:
        where = f"{self.out} " if self.remote else ""
        return where + hashlib.sha256(info.read_bytes()).hexdigest()


def goes_to_url(out: str | Path, private: Path | None, overwrite: bool, append: bool) -> bool:
    """Whether the dataset goes to a URL, which needs a private folder; looks at no file.

    Raises:
        UserError: a URL without a private folder, a folder with one, or options that exclude each other.
    """
    if overwrite and append:
        raise UserError("--overwrite and --append exclude each other")
    remote = is_url(out)
    if remote and private is None:
        raise UserError(
            f"{out}: with an OUT that is no local folder give --private DIR: the plan and the table that links samples "
            "to files go there"
        )
    if not remote and private is not None:
        raise UserError("--private is for an OUT that is a URL; beside a folder it is OUT.private")
    return remote


def stray_files(names: list[str], info: DatasetInfo) -> list[str]:
    """What lies in a dataset's folder and does not belong to it."""
    expected = {INFO, INDEX, QUARANTINE}
    expected |= {f"{SHARDS}/{shard.name}" for shard in info.shards}
    expected |= {f"{SHARDS}/{shard.name.removesuffix('.tar')}.idx" for shard in info.shards}
    return sorted(set(names) - expected)
