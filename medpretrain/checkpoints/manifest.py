"""The manifest of a checkpoint: what it belongs to, its files, and where each range of each tensor lies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.errors import UserError

FORMAT = 4
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or that is not, byte for byte, what was written."""


class OtherFormat(CheckpointError):
    """A checkpoint that is whole, but that another version of medpretrain wrote and reads."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint belongs to.

    `recipe` is the resolved recipe as text, the digests are SHA-256 in hex, one for each dataset in their order,
    `world_size` counts the processes that trained, `strategy` is the recipe's.
    `step`, `extra` (plain JSON) and `metric` are filled in by a save, so one object serves a whole run.
    """

    recipe: str
    recipe_sha256: str
    dataset_sha256: tuple[str, ...]
    world_size: int
    strategy: str = "ddp"
    step: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    metric: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of a tensor laid out row-major, from byte `offset` of `file` on."""

    file: str
    offset: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor: its dtype by the name safetensors gives it, its whole shape, and its pieces from first to last."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    info: CheckpointInfo
    files: Mapping[str, Written]
    tensors: Mapping[str, Stored]

    def to_bytes(self) -> bytes:
        return _to_bytes(
            {
                **{item.name: getattr(self.info, item.name) for item in dataclasses.fields(CheckpointInfo)},
                "format": FORMAT,
                "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in self.files.items()},
                "tensors": {
                    name: {
                        "dtype": tensor.dtype,
                        "shape": tensor.shape,
                        "pieces": [[piece.file, piece.offset, piece.start, piece.stop] for piece in tensor.pieces],
                    }
                    for name, tensor in self.tensors.items()
                },
            }
        )


def parse(data: bytes, step: int, place: str) -> Manifest:
    """The manifest in `data`, which stands at `place` and must be of `step`.

    Raises:
        OtherFormat: another version's.
        CheckpointError: not byte for byte what a save wrote, or of another step.
    """
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is damaged: it is not JSON") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{place} is damaged: it is not a JSON object")
    version = plain.get("format")
    if isinstance(version, int) and version != FORMAT:
        # A flipped bit in this very number must not look like another version's checkpoint.
        whole = plain.get("checksum") == _checksum(plain)
        if version > FORMAT:
            raise (OtherFormat if whole else CheckpointError)(
                f"{place} has format {version} and this version reads up to {FORMAT}: it needs a newer medpretrain"
                + ("" if whole else ", or is damaged")
            )
        raise (OtherFormat if whole else CheckpointError)(
            f"{place} has format {version}, which is one file of one process; go on with the version of "
            "medpretrain that wrote it" + ("" if whole else " (or it is damaged)")
        )
    if data != _to_bytes(plain):
        raise CheckpointError(f"{place} is damaged: its checksum does not fit its content")
    # From here on it is what a save wrote, though perhaps for another folder.
    if plain["step"] != step:
        raise CheckpointError(f"{place} belongs to step {plain['step']}, not to step {step}")
    about = {item.name: plain[item.name] for item in dataclasses.fields(CheckpointInfo)}
    about["dataset_sha256"] = tuple(about["dataset_sha256"])
    return Manifest(
        CheckpointInfo(**about),
        {name: Written(**entry) for name, entry in plain["files"].items()},
        {
            name: Stored(entry["dtype"], tuple(entry["shape"]), tuple(Piece(*piece) for piece in entry["pieces"]))
            for name, entry in plain["tensors"].items()
        },
    )


def check_whole(tensors: Mapping[str, Stored]) -> None:
    """The pieces of every tensor cover it exactly once.

    Raises:
        AssertionError: they do not, so whoever made the parts has a bug; what it writes is no checkpoint.
    """
    for name, tensor in tensors.items():
        end = 0
        for piece in tensor.pieces:
            if piece.start != end:
                fault = "nobody has" if piece.start > end else "two have"
                first, last = sorted((end, piece.start))
                raise AssertionError(f"{name}: {fault} elements {first} to {last - 1}")
            end = piece.stop
        if end != math.prod(tensor.shape):
            raise AssertionError(f"{name}: nobody has elements {end} to {math.prod(tensor.shape) - 1}")


def check_plain(value: object, where: str) -> None:
    """What comes back from JSON as it went in.

    Raises:
        TypeError: names the place that would not.
    """
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which JSON does not have")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; a manifest takes strings only")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a manifest takes what JSON has")


def _checksum(plain: Mapping[str, Any]) -> str:
    bare = {key: value for key, value in plain.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _to_bytes(plain: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest: any other bytes with the same meaning count as damage.

    A line for each key, file and tensor: one line for each number would be a hundred thousand lines.
    """
    lines = []
    for key, value in sorted({**plain, "checksum": _checksum(plain)}.items()):
        if key in ("files", "tensors") and isinstance(value, dict) and value:
            items = [
                f"    {json.dumps(name)}: {json.dumps(item, sort_keys=True)}" for name, item in sorted(value.items())
            ]
            lines.append(f'  "{key}": {{\n' + ",\n".join(items) + "\n  }")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
