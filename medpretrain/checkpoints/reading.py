"""Checkpoints that verify, and what is in them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from medpretrain.checkpoints.agreement import together
from medpretrain.checkpoints.folder_target import FolderTarget
from medpretrain.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointInfo,
    Manifest,
    OtherFormat,
    Stored,
    parse,
)
from medpretrain.checkpoints.parts import DTYPES, Part
from medpretrain.checkpoints.places import locate
from medpretrain.checkpoints.target import Target, step_of
from medpretrain.training.process import Process

_BLOCK = 1 << 24  # bytes read at once
_GAP = 1 << 16  # bytes that are sooner read than skipped
_TORCH = {name: dtype for dtype, name in DTYPES.items()}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint that verified; str() is its path or URL."""

    target: Target
    name: str
    info: CheckpointInfo
    sha256: str = field(repr=False)
    """Of its manifest, which has those of all files: another checkpoint under the same name is not this one."""

    def __str__(self) -> str:
        return self.target.place(self.name)

    @property
    def step(self) -> int:
        return self.info.step


def at(place: str | Path, process: Process | None = None) -> Found:
    """The checkpoint at a path or URL.

    Raises:
        CheckpointError: see `verify`.
    """
    return verify(*locate(place), process)


def verify(target: Target, name: str, process: Process | None = None) -> Found:
    """Read every byte of a checkpoint and compare it with what was written; each process reads some of the files.

    Raises:
        CheckpointError: on every process, with the file and what is wrong: changed, cut, missing, extra, of another
            checkpoint or another version (OtherFormat).
        WorkFailed: the store cannot be reached.
    """
    manifest, sha256 = _manifest(target, name, process)
    rank, world = (0, 1) if process is None else (process.rank, process.world)
    largest_first = sorted(manifest.files, key=lambda file: (-manifest.files[file].bytes, file))

    def mine() -> None:
        for file in largest_first[rank::world]:
            if _sha256(target, name, file, manifest.files[file].bytes) != manifest.files[file].sha256:
                raise CheckpointError(
                    f"{target.place(name, file)} is damaged: its SHA-256 is not the one in {MANIFEST}"
                )

    together(process, mine, lambda _: None)
    return Found(target, name, manifest.info, sha256)


def newest(target: Target, process: Process | None = None, aside: bool = False) -> Found | None:
    """The checkpoint of the highest step that verifies, or None.

    Each damaged one above it is named in a warning. None is also the answer when all are damaged: see `target.names()`
    before training starts anew.

    Args:
        process: all of a run's processes call this; None for one alone.
        aside: once a whole one is found, move the damaged ones above it to the folder `aside`, where they are no
            candidates any more. In an object store they stay, for nothing there can be moved.

    Raises:
        OtherFormat: one above it is another version's: it is not older work that should be done again.
        WorkFailed: the store cannot be reached.
    """
    damaged: list[str] = []
    leads = process is None or process.leads
    for name in together(process, lambda: None, lambda _: target.names()):
        try:
            found = verify(target, name, process)
        except OtherFormat:
            raise
        except CheckpointError as error:
            if leads:
                _log.warning("passing over a checkpoint: %s", error)
            damaged.append(name)
            continue
        for other in damaged if aside and isinstance(target, FolderTarget) else ():
            place = together(process, lambda: None, partial(_put_aside, target, other))
            if leads and place:
                _log.warning("the damaged checkpoint %s is kept as %s", target.place(other), place)
        return found
    return None


def aside_later(target: Target, step: int, process: Process | None = None) -> list[str]:
    """Move checkpoints of steps after `step` out of the way; gives their new places, where they are kept.

    So a run that goes on from `step` by intent does not go on from them after a crash.
    """
    return together(
        process,
        lambda: None,
        lambda _: [target.put_aside(name) for name in target.names() if (step_of(name) or 0) > step],
    )


def load(found: Found, parts: Iterable[Part], process: Process | None = None) -> None:
    """Fill the values of `parts`, in place, whatever processes wrote the checkpoint.

    A process reads the ranges of its own parts, block by block; beside a block it needs memory for one tensor, and that
    only where it is not laid out row-major.

    Raises:
        CheckpointError: on every process: the checkpoint lacks a tensor, has one that no process asked for, or has it
            with another shape or dtype; nothing is filled. Or it is not any more what `found` was.
    """
    wanted = list(parts)
    manifest = _same(found, process)

    def known() -> set[str]:
        faults = []
        for part in wanted:
            stored = manifest.tensors.get(part.name)
            if stored is None:
                faults.append(f"it lacks {part.name}")
            elif (stored.dtype, stored.shape) != (part.dtype, tuple(part.shape)):
                faults.append(
                    f"{part.name} is {stored.dtype} {list(stored.shape)} there and {part.dtype} {list(part.shape)} here"
                )
        if faults:
            raise CheckpointError(f"{found} does not fit: {_some(faults)}")
        return {part.name for part in wanted}

    def nothing_left(names: list[set[str]]) -> None:
        more = sorted(manifest.tensors.keys() - set().union(*names))
        if more:
            raise CheckpointError(f"{found} does not fit: nothing here takes {_some(more)}")

    together(process, known, nothing_left)
    together(process, lambda: _fill(found, manifest, wanted), lambda _: None)


def read(found: Found, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, by the rest of their names, on the CPU.

    Raises:
        CheckpointError: it is not any more what `found` was.
    """
    manifest = _same(found, None)
    tensors = {
        name: torch.empty(stored.shape, dtype=_TORCH[stored.dtype])
        for name, stored in manifest.tensors.items()
        if name.startswith(prefix)
    }
    _fill(found, manifest, [Part(name, tuple(values.shape), values) for name, values in tensors.items()])
    return {name.removeprefix(prefix): values for name, values in tensors.items()}


class _Need(NamedTuple):
    """Bytes of a file, and where they go: `into` (bytes,) uint8, at the values or in a copy of them."""

    offset: int
    into: Tensor


@torch.no_grad()
def _fill(found: Found, manifest: Manifest, parts: Sequence[Part]) -> None:
    needs: dict[str, list[_Need]] = {}
    direct = [part for part in parts if part.values.is_contiguous()]
    for part in direct:
        _add_needs(needs, part, manifest.tensors[part.name], part.values.detach().reshape(-1))
    _read_all(found, needs)
    for part in parts:
        if not part.values.is_contiguous():
            whole = torch.empty(part.shape, dtype=part.values.dtype)
            needs = {}
            _add_needs(needs, part, manifest.tensors[part.name], whole.reshape(-1))
            _read_all(found, needs)
            part.values.copy_(whole)


def _add_needs(needs: dict[str, list[_Need]], part: Part, stored: Stored, flat: Tensor) -> None:
    width = flat.element_size()
    raw = flat.view(torch.uint8)
    for piece in stored.pieces:
        first, last = max(piece.start, part.start), min(piece.stop, part.stop)
        if first < last:
            into = raw[(first - part.start) * width : (last - part.start) * width]
            needs.setdefault(piece.file, []).append(_Need(piece.offset + (first - piece.start) * width, into))


def _read_all(found: Found, needs: dict[str, list[_Need]]) -> None:
    block = torch.empty(_BLOCK if needs else 0, dtype=torch.uint8)
    view = memoryview(block.numpy())  # type: ignore[arg-type]
    for file, wanted in sorted(needs.items()):
        with found.target.reader(found.name, file) as reader:
            for group in _groups(wanted):
                start = group[0].offset
                size = max(need.offset + len(need.into) for need in group) - start
                reader.read(start, view[:size])
                for need in group:
                    need.into.copy_(block[need.offset - start : need.offset - start + len(need.into)])


def _groups(needs: Iterable[_Need]) -> Iterator[list[_Need]]:
    """What is read at once: neighbours, at most a block of them; a range of an object store is a request of its own."""
    group: list[_Need] = []
    end = 0
    for need in sorted(_cut(needs), key=lambda need: need.offset):
        last = need.offset + len(need.into)
        if group and (need.offset - end > _GAP or max(last, end) - group[0].offset > _BLOCK):
            yield group
            group = []
        end = max(last, end) if group else last
        group.append(need)
    if group:
        yield group


def _cut(needs: Iterable[_Need]) -> Iterator[_Need]:
    for need in needs:
        for first in range(0, len(need.into), _BLOCK):
            yield _Need(need.offset + first, need.into[first : first + _BLOCK])


def _sha256(target: Target, name: str, file: str, size: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(size, _BLOCK)))
    with target.reader(name, file) as reader:
        for start in range(0, size, _BLOCK):
            part = buffer[: min(_BLOCK, size - start)]
            reader.read(start, part)
            digest.update(part)
    return digest.hexdigest()


def _manifest(target: Target, name: str, process: Process | None) -> tuple[Manifest, str]:
    """What rank 0 read, checked with the names and sizes of the files."""

    def checked(_: list[None]) -> bytes:
        data, step = target.manifest(name), step_of(name)
        if step is None:
            raise CheckpointError(f"{target.place(name)} is no checkpoint: its name is not step-NUMBER")
        target.check_files(name, parse(data, step, target.place(name, MANIFEST)))
        return data

    data = together(process, lambda: None, checked)
    return parse(data, step_of(name) or 0, target.place(name, MANIFEST)), hashlib.sha256(data).hexdigest()


def _same(found: Found, process: Process | None) -> Manifest:
    manifest, sha256 = _manifest(found.target, found.name, process)
    if sha256 != found.sha256:
        raise CheckpointError(f"{found} was replaced after it was verified")
    return manifest


def _put_aside(target: Target, name: str, _: list[None]) -> str:
    try:
        return target.put_aside(name)
    except OSError as error:  # a folder that may only be read, say; the next checkpoint can be taken nevertheless
        _log.warning("a damaged checkpoint could not be moved: %s", error)
        return ""


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
