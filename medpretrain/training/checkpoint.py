"""Checkpoints that are committed or do not exist.

    RUN/checkpoints/step-00001234/state.pt        the state, written by torch.save
    RUN/checkpoints/step-00001234/manifest.json   what it belongs to; bytes and SHA-256 of every file

A checkpoint is written under a temporary name, flushed to disk, then made visible by one rename. Every byte is verified
before it is used. One process writes a run's checkpoints at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from data_prep.errors import UserError

FORMAT = 3
_STATE = "state.pt"
MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
# A step saved again sets the earlier save aside as `.old` for the moment between two renames; a save killed just then
# leaves it as the only one of its step, so it is read like any other.
_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_CHUNK = 1 << 22

_log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or that is not, byte for byte, what was written."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint belongs to.

    `recipe` is the resolved recipe as text, the digests are SHA-256 in hex, one for each dataset in their order,
    `world_size` counts the ranks that trained.
    `step` is filled in by `save`, so one object serves a whole run.
    """

    recipe: str
    recipe_sha256: str
    dataset_sha256: tuple[str, ...]
    world_size: int
    step: int = 0


def save(run: Path, step: int, state: Mapping[str, Any], about: CheckpointInfo, keep: int) -> Path:
    """Commit `state` as the checkpoint of `step`, then remove the oldest ones beyond `keep`.

    A checkpoint of the same step, from before a rollback, is replaced; at every moment one of the two is visible. Those
    of later steps and damaged ones are left alone and do not count towards `keep`.

    Args:
        run: the run folder.
        step: steps done, >= 0.
        state: nested dicts, lists and tuples of tensors, numbers, strings and None (what weights_only=True loads).
        about: what the state belongs to.
        keep: how many whole checkpoints stay, with this one; >= 1.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: it could not be written, the disk being full for example; what was committed is untouched.
        UserError: `keep` is less than 1.
        TypeError: the state holds something that would not load again.
    """
    assert step >= 0
    if keep < 1:
        raise UserError(f"at least one checkpoint must be kept, not {keep}")
    _check_plain(state, "state")
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    replaced = folder / f"{final.name}.old"
    temporary = _hidden(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fsync_folder(run)
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            _delete(leftover)
        temporary.mkdir()
        with open(temporary / _STATE, "xb") as file:
            writer = _HashingWriter(file)
            torch.save(dict(state), cast("BinaryIO", writer))
            written = writer.finish()
        manifest = dataclasses.asdict(about) | {"format": FORMAT, "step": step, "files": {_STATE: written}}
        with open(temporary / MANIFEST, "xb") as file:
            file.write(_manifest_bytes(manifest))
            _fsync(file)
        _fsync_folder(temporary)
        if final.exists():
            if replaced.exists():
                _remove(replaced)
            os.rename(final, replaced)
        os.rename(temporary, final)
        _fsync_folder(folder)
    except OSError as error:
        raise CheckpointError(f"the checkpoint of step {step} could not be saved in {folder}: {error}") from error
    finally:
        if temporary.exists():
            _delete(temporary)
    for path in {replaced, *_beyond(folder, step, keep)}:
        if not path.exists():
            continue
        try:
            _remove(path)
        except OSError as error:
            _log.warning("an old checkpoint could not be removed: %s", error)
    return final


def verify(path: Path) -> CheckpointInfo:
    """Read every byte of the checkpoint at `path` and compare it with what was written.

    Raises:
        CheckpointError: names the file and what is wrong: changed, cut, missing, extra, of another checkpoint, or
            written by a newer version.
    """
    info, files = _read_manifest(path)
    for name, entry in files.items():
        digest = hashlib.sha256()
        try:
            with open(path / name, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if digest.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return info


def newest(run: Path) -> Path | None:
    """The checkpoint of the highest step that verifies, or None.

    Each damaged one above it is named in a warning and left in place. None is also the answer when all are damaged:
    look for folders in RUN/checkpoints before training starts anew.
    """
    for path in _committed(run / "checkpoints"):
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("passing over a checkpoint: %s", error)
        else:
            return path
    return None


def load(path: Path, map_location: str | torch.device = "cpu") -> tuple[dict[str, Any], CheckpointInfo]:
    """Verify the checkpoint at `path` and give its state.

    The file is read once and the bytes that were hashed are the bytes that are loaded, so it needs the size of the file
    in memory beside the state itself.

    Args:
        path: the folder of the checkpoint.
        map_location: where the tensors go.

    Raises:
        CheckpointError: see `verify`.
    """
    info, files = _read_manifest(path)
    try:
        data = (path / _STATE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / _STATE} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != files[_STATE]["sha256"]:
        raise CheckpointError(f"{path / _STATE} is damaged: its SHA-256 is not the one in {MANIFEST}")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    return state, info


class _HashingWriter:
    """A file object for torch.save that hashes what goes through it.

    torch turns an OSError in `write` into a RuntimeError about positions, so the first one is kept, the rest of the
    stream is dropped, and `finish` raises it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        self._digest.update(data)
        self._bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """torch calls it; `finish` flushes."""

    def finish(self) -> dict[str, Any]:
        """Put all on disk; gives the file's entry in the manifest."""
        if self._error is not None:
            raise self._error
        _fsync(self._file)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest: any other bytes with the same meaning count as damage."""
    bare = {key: value for key, value in manifest.items() if key != "checksum"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()
    whole = bare | {"checksum": hashlib.sha256(canonical).hexdigest()}
    return (json.dumps(whole, sort_keys=True, indent=2) + "\n").encode()


def _read_manifest(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Check all of a checkpoint but the content of its files; gives what it belongs to and its files' entries."""
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing" if path.is_dir() else f"there is no checkpoint at {path}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{file} has format {version} and this version reads up to {FORMAT}: it needs a newer medpretrain"
        )
    if isinstance(version, int) and version < FORMAT:
        raise CheckpointError(
            f"{file} has format {version}, which does not say what its labels are; go on with the version of "
            "medpretrain that wrote it"
        )
    if data != _manifest_bytes(manifest):
        raise CheckpointError(f"{file} is damaged: its checksum does not fit its content")
    # From here on it is what `save` wrote, though perhaps for another folder.
    name = _NAME.fullmatch(path.name)
    if name is None or int(name[1]) != manifest["step"]:
        raise CheckpointError(f"{file} belongs to step {manifest['step']}, not to {path.name}")
    files: dict[str, Any] = manifest["files"]
    for missing in sorted(files.keys() - found.keys()):
        raise CheckpointError(f"{path / missing} is missing")
    for extra in sorted(found.keys() - files.keys() - {MANIFEST}):
        raise CheckpointError(f"{path / extra} is no part of the checkpoint")
    for entry, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path / entry} is not a plain file")
        if entry in files and status.st_size != files[entry]["bytes"]:
            raise CheckpointError(f"{path / entry} has {status.st_size} bytes, not {files[entry]['bytes']}")
    fields = {field.name: manifest[field.name] for field in dataclasses.fields(CheckpointInfo)}
    hashes = fields["dataset_sha256"]
    fields["dataset_sha256"] = tuple(hashes)
    return CheckpointInfo(**fields), files


def _committed(folder: Path) -> list[Path]:
    """The visible checkpoints, damaged or not, highest step first; of one step the later save first."""
    names = [_NAME.fullmatch(name) for name in (os.listdir(folder) if folder.is_dir() else [])]
    found = [(int(name[1]), name[2] is None, folder / name[0]) for name in names if name]
    return [path for *_, path in sorted(found, reverse=True)]


def _beyond(folder: Path, step: int, keep: int) -> list[Path]:
    """The whole checkpoints up to `step` that the newest `keep` steps do not need."""
    kept: set[str] = set()
    spare = []
    for path in _committed(folder):
        name = _NAME.fullmatch(path.name)
        if name is None or int(name[1]) > step:
            continue
        try:
            _read_manifest(path)
        except CheckpointError:
            continue  # left for `newest` to name
        if name[1] in kept or len(kept) == keep:
            spare.append(path)
        else:
            kept.add(name[1])
    return spare


def _hidden(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    """Out of sight by one rename, then deleted: a removal that is killed leaves no half checkpoint behind."""
    hidden = _hidden(path)
    os.rename(path, hidden)
    _delete(hidden)


def _delete(hidden: Path) -> None:
    """What stays (an open file on NFS, say) is tried again at the next save; it must not stop this one."""
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("a temporary folder could not be deleted: %s", error)


def _check_plain(value: object, where: str) -> None:
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for key, item in value.items():
            if type(key) not in (int, str):
                raise TypeError(f"{where} has the key {key!r}; a checkpoint takes strings and whole numbers")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint takes tensors, numbers, strings and None")


def _fsync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
