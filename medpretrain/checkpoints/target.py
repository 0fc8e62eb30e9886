"""Where checkpoints are: what a folder and an object store both do.

One process at a time changes a target: rank 0 of the run. In a folder a lock sees to it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from medpretrain.checkpoints.manifest import CheckpointError, Manifest

# A step saved again sets the earlier save aside as `.old` for the moment between two renames; a save killed just then
# leaves it as the only one of its step, so it is read like any other.
NAME = re.compile(r"step-(\d{8,})(\.old)?")
ASIDE = "aside"


@dataclass
class Draft:
    """A checkpoint in the making.

    Its files' names begin with `prefix`, of which the manifest has `mark`.
    """

    name: str
    prefix: str
    mark: str = ""
    lock: int | None = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "prefix": self.prefix, "mark": self.mark, "lock": None}  # the lock stays with rank 0

    def file(self, rank: int, world: int) -> str:
        """The name of a process's file, as the manifest has it."""
        return self.mark + data_name(rank, world)


def data_name(rank: int, world: int) -> str:
    """
    >>> data_name(3, 8)
    'rank-00003-of-00008.safetensors'
    """
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


class Reader(Protocol):
    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` on.

        Raises:
            CheckpointError: there is less, or it cannot be read.
        """


class Target(Protocol):
    """A place for checkpoints; str() is the path or URL."""

    def names(self) -> list[str]:
        """The visible checkpoints, damaged or not, highest step first; of one step the later save first."""

    def place(self, name: str, file: str = "") -> str:
        """The path or URL of a checkpoint or one of its files, for messages."""

    def manifest(self, name: str) -> bytes:
        """Raises CheckpointError: there is none, or it cannot be read."""

    def check_files(self, name: str, manifest: Manifest) -> None:
        """All there, each with its size, and no other. Raises CheckpointError."""

    def reader(self, name: str, file: str) -> contextlib.AbstractContextManager[Reader]:
        """One file, to be read in ranges."""

    def begin(self, step: int, size: int, files: int) -> Draft:
        """Rank 0: make room for a checkpoint of `size` bytes; what killed saves left behind is removed."""

    def create(self, draft: Draft, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Any process: a new file, on disk when the context ends without an error."""

    def commit(self, draft: Draft, manifest: Manifest) -> None:
        """Rank 0: let the checkpoint appear, in place of an earlier one of its step."""

    def abandon(self, draft: Draft) -> None:
        """Rank 0: remove what was written; does not raise."""

    def end(self, draft: Draft) -> None:
        """Rank 0: let others write again, after `commit` and whatever was removed then, or `abandon`."""

    def remove(self, name: str) -> None:
        """Out of sight in one step, then deleted: a removal that is killed leaves no half checkpoint."""

    def put_aside(self, name: str) -> str:
        """Keep a checkpoint where it is no candidate any more; gives its new place."""


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name, None where it is no name of one.

    >>> step_of("step-00000012"), step_of("step-00000012.old"), step_of("notes")
    (12, 12, None)
    """
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None


def write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered file takes at most 2 GiB at a time, and may take less."""
    while len(data):
        data = data[file.write(data) :]


def by_step(names: Iterable[str]) -> list[str]:
    """The names of checkpoints among `names`, highest step first; of one step the later save first."""
    found = [(int(name[1]), name[2] is None, name[0]) for name in map(NAME.fullmatch, names) if name]
    return [name for *_, name in sorted(found, reverse=True)]


def known_step(name: str) -> int:
    step = step_of(name)
    assert step is not None
    return step


def check_sizes(place: str, sizes: Mapping[str, int], manifest: Manifest) -> None:
    for name, file in sorted(manifest.files.items()):
        if name not in sizes:
            raise CheckpointError(f"{place}/{name} is missing")
        if sizes[name] != file.bytes:
            raise CheckpointError(f"{place}/{name} has {sizes[name]} bytes, not {file.bytes}")
