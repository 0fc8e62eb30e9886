"""From what a user writes to the place of checkpoints."""

from __future__ import annotations

from pathlib import Path

from data_prep.store import is_url
from medpretrain.checkpoints.folder_target import FolderTarget
from medpretrain.checkpoints.store_target import StoreTarget
from medpretrain.checkpoints.target import Target


def open_target(to: str | None, run: Path) -> Target:
    """The target that checkpoint.to names: a folder, a URL such as s3://bucket/run, or RUN/checkpoints for None.

    Raises:
        UserError: a URL with a password, one of local files, or of a file system that is not installed.
    """
    if to is None:
        return FolderTarget(run / "checkpoints")
    return StoreTarget(to) if is_url(to) else FolderTarget(Path(to))


def locate(place: str | Path) -> tuple[Target, str]:
    """The target and the name of the checkpoint at a path or URL.

    >>> target, name = locate("runs/a/checkpoints/step-00000012/")
    >>> str(target), name
    ('runs/a/checkpoints', 'step-00000012')
    """
    if is_url(place):
        parent, _, name = str(place).rstrip("/").rpartition("/")
        return StoreTarget(parent), name
    return FolderTarget(Path(place).parent), Path(place).name
