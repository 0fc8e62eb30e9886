"""What a process holds of a run's tensors, and which of it goes into its file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpretrain.checkpoints.manifest import Piece, Stored

DIVIDED = 1 << 16
"""Elements from which on a tensor that all processes hold is written by all of them, a range each."""
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""By the names of safetensors."""


@dataclass(frozen=True)
class Part:
    """The elements of one tensor that this process holds.

    To be written, or, for `load`, to be filled.
    """

    name: str
    """Of the whole tensor; for example method.student.blocks.0.attn.qkv.weight or optimizer.<parameter>.exp_avg."""
    shape: tuple[int, ...]
    """Of the whole tensor, () for a scalar."""
    values: Tensor
    """copied: the whole tensor, in any memory layout, on any device. Else 1-D, contiguous, perhaps empty."""
    start: int = 0
    """The place of values[0] in the whole tensor laid out row-major."""
    copied: bool = True
    """Every process holds the same whole tensor; else these elements are this process's alone."""

    def __post_init__(self) -> None:
        if self.values.dtype not in DTYPES:
            raise TypeError(f"{self.name} is of {self.values.dtype}, which safetensors does not have")
        if self.copied:
            assert tuple(self.values.shape) == tuple(self.shape), self.name
            assert self.start == 0, self.name
        else:
            assert self.values.ndim == 1, self.name
            assert self.values.is_contiguous(), self.name
            assert 0 <= self.start <= self.stop <= math.prod(self.shape), self.name

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def dtype(self) -> str:
        return DTYPES[self.values.dtype]

    def flat(self) -> Tensor:
        """The values (stop - start,) in row-major order; a copy where memory is laid out in another way."""
        return self.values.detach().reshape(-1)


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the whole tensor, which `part` has."""

    part: Part
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.part.values.element_size()

    def raw(self) -> Tensor:
        """The bytes, (bytes,) uint8, where the part's values are."""
        first = self.start - self.part.start
        return self.part.flat()[first : first + self.stop - self.start].view(torch.uint8)


def share(parts: Sequence[Part], rank: int, world: int) -> list[Slice]:
    """What process `rank` of `world` writes.

    Its own elements all; of tensors that all hold, an equal range of each large one, and small ones whole, each given
    to the process with the fewest bytes of them so far. That needs no word between processes where all have the same
    copied parts in the same order.
    """
    assert len({part.name for part in parts if part.copied}) == sum(part.copied for part in parts), "a name twice"
    mine = []
    load = [0] * world
    small = sorted(
        (part for part in parts if part.copied and part.stop < DIVIDED), key=lambda part: -part.values.nbytes
    )
    for part in small:
        least = load.index(min(load))
        load[least] += part.values.nbytes
        if least == rank:
            mine.append(Slice(part, 0, part.stop))
    for part in parts:
        if not part.copied:
            mine.append(Slice(part, part.start, part.stop))
        elif part.stop >= DIVIDED:
            mine.append(Slice(part, part.stop * rank // world, part.stop * (rank + 1) // world))
    return mine


@dataclass(frozen=True)
class Layout:
    """A file: its safetensors header, what follows it, and the ranges as the manifest has them."""

    header: bytes
    slices: tuple[Slice, ...]
    tensors: dict[str, Stored]
    bytes: int


def lay_out(slices: Iterable[Slice], file: str) -> Layout:
    """Where each slice goes in `file`; the widest numbers first, so that all are aligned."""
    ordered = sorted(slices, key=lambda each: -each.part.values.element_size())
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, places = 0, []
    for each in ordered:
        part, length = each.part, each.stop - each.start
        whole = length == math.prod(part.shape)
        key, shape = (part.name, part.shape) if whole else (f"{part.name}[{each.start}:{each.stop}]", (length,))
        if whole or length:
            assert key not in entries, key
            entries[key] = {"dtype": part.dtype, "shape": shape, "data_offsets": [position, position + each.bytes]}
        places.append(position)
        position += each.bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    tensors: dict[str, Stored] = {}
    for each, place in zip(ordered, places, strict=True):
        piece = Piece(file, len(header) + place, each.start, each.stop)
        pieces = (piece,) if each.stop > each.start else ()
        before = tensors.get(each.part.name)
        stored = Stored(each.part.dtype, tuple(each.part.shape), pieces)
        tensors[each.part.name] = stored if before is None else merged(each.part.name, before, stored)
    return Layout(header, tuple(ordered), tensors, len(header) + position)


def merged(name: str, one: Stored, other: Stored) -> Stored:
    """The pieces of both.

    Raises:
        AssertionError: two processes have another dtype or shape for one name.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise AssertionError(f"{name} is {one.dtype} {one.shape} and {other.dtype} {other.shape}")
    return Stored(one.dtype, one.shape, (*one.pieces, *other.pieces))


def joined(layouts: Iterable[dict[str, Stored]]) -> dict[str, Stored]:
    """The tensors of all files, their pieces from first to last."""
    found: dict[str, Stored] = {}
    pieces: dict[str, list[Piece]] = {}
    for layout in layouts:
        for name, stored in layout.items():
            before = found.setdefault(name, stored)
            merged(name, before, stored)
            pieces.setdefault(name, []).extend(stored.pieces)
    return {
        name: Stored(
            stored.dtype, stored.shape, tuple(sorted(pieces[name], key=lambda piece: (piece.start, piece.stop)))
        )
        for name, stored in found.items()
    }
