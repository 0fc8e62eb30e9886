"""Files and folders that appear under their name when all of them is on disk, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write a file to; what was there before stays until it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A name beside `out` to make a folder under; its files are brought to the disk by whoever writes them.

    What was there before is replaced. A crash between the two renames leaves it whole under a hidden name beside `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        yield partial
        _commit(partial, out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _commit(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
    else:
        earlier = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.replaced"
        out.rename(earlier)
        try:
            partial.rename(out)
        except OSError:
            earlier.rename(out)
            raise
        shutil.rmtree(earlier)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
