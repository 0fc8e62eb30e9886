"""Whether checkpoints can be written where the recipe wants them, how fast, and how much room there is."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError, WorkFailed
from data_prep.store import UrlStore, is_url
from medpretrain.recipe import Recipe

_PIECE = 4 << 20
_MOST = 64 << 20  # bytes written to measure
_MOST_S = 2.0
_SMALL_OBJECT = 1 << 20


@dataclass(frozen=True)
class TargetSeen:
    """Where checkpoints go, as this host sees it.

    Attributes:
        place: path or URL.
        free: bytes, None for an object store, which does not tell.
        there: checkpoints that it has already.
        write_bytes_s: measured with a temporary file, synced; None where nothing could be written.
        problem: why nothing can be written there, None where it can.
    """

    place: str
    free: int | None = None
    there: int = 0
    write_bytes_s: float | None = None
    problem: str | None = None


def look_at_target(recipe: Recipe) -> TargetSeen:
    """Write a file of bounded size and let it go.

    Where the folder is not there yet, the nearest one above it is tried: nothing is made.
    """
    to = recipe.checkpoint.to
    if to is not None and is_url(to):
        return _object_store(to)
    folder = target_folder(recipe)
    try:
        there = sum(name.startswith("step-") for name in os.listdir(folder)) if folder.is_dir() else 0
        above = _existing(folder)
        disk = os.statvfs(above)
    except OSError as error:
        return TargetSeen(str(folder), problem=_said(error, folder))
    free = disk.f_bavail * disk.f_frsize
    try:
        speed = _write(above, min(_MOST, free // 4))
    except OSError as error:
        return TargetSeen(str(folder), free, there, problem=_said(error, above))
    return TargetSeen(str(folder), free, there, speed)


def target_folder(recipe: Recipe) -> Path:
    """Of a recipe whose checkpoints do not go to a URL."""
    return Path(recipe.checkpoint.to or recipe.run_dir / "checkpoints")


@contextmanager
def marker(recipe: Recipe, name: str) -> Iterator[None]:
    """A file that all hosts see if the target's folder is the same for all of them; gone afterwards."""
    path = _existing(target_folder(recipe)) / name
    path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def sees_marker(recipe: Recipe, name: str) -> bool:
    """Whether this host sees the file; a shared file system is given some seconds."""
    folder = _existing(target_folder(recipe))
    for _ in range(20):
        if name in os.listdir(folder):  # a listing asks the server; a look at one name may be remembered
            return True
        time.sleep(0.25)
    return False


def _write(folder: Path, size: int) -> float:
    """Bytes a second, with the sync; the file has no name on most file systems, so nothing of it can stay.

    Raises:
        OSError: no right to, no room, ...
    """
    piece = secrets.token_bytes(_PIECE)  # a file system may compress
    written = 0
    with tempfile.TemporaryFile(prefix=".preflight-", dir=folder, buffering=0) as file:
        began = time.perf_counter()
        while True:
            written += file.write(piece[: max(1, min(_PIECE, size - written))])
            if written >= size or time.perf_counter() - began > _MOST_S:
                break
        os.fsync(file.fileno())
        return written / (time.perf_counter() - began)


def _object_store(url: str) -> TargetSeen:
    store = UrlStore(url.rstrip("/"))
    name = f".preflight-{secrets.token_hex(8)}"
    try:
        there = len({path.partition("/")[0] for path in store.names() if path.startswith("step-")})
        with store.scratch() as folder:
            size = _SMALL_OBJECT
            took = _put(store, folder / name, size)
            if took < _MOST_S / 4:  # that was the way there and back; what is large tells how fast it is
                size = _MOST
                took = _put(store, folder / name, size)
    except (UserError, WorkFailed, OSError) as error:
        return TargetSeen(url, problem=" ".join(str(error).split()))
    return TargetSeen(url, None, there, size / took)


def _put(store: UrlStore, file: Path, size: int) -> float:
    """Seconds until an object is there, which goes again."""
    file.write_bytes(secrets.token_bytes(size))
    began = time.perf_counter()
    try:
        store.add(file, file.name)
    except (WorkFailed, OSError):
        with contextlib.suppress(WorkFailed, OSError):  # the first error is the one to tell
            store.remove(file.name)
        raise
    took = time.perf_counter() - began
    store.remove(file.name)
    return took


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there.

    Raises:
        NotADirectoryError: something else is in its place.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", str(place))
    return place


def _said(error: OSError, folder: Path) -> str:
    return f"{error.filename or folder}: {error.strerror or error}"
