"""Features kept on disk under a hash of all that they depend on; no file says whose images they are of."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import nvidia.dali
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import medpretrain
from data_prep.errors import UserError
from medpretrain.whole import whole_file

FORMAT = "medpretrain features"
VERSION = 1
VARIABLE = "MEDPRETRAIN_CACHE"

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Where features are kept if nobody says: $MEDPRETRAIN_CACHE, or ~/.cache/medpretrain/features."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "medpretrain" / "features"


def cache_key(source_sha256: str, dataset_sha256: str, rows_N: NDArray[np.int64], device: torch.device) -> str:
    """SHA-256 of what features are a function of: network, images, their order, and whatever computes them.

    Versions are among it, for another one may decode an image or add up a layer in another way.
    """
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    parts = {
        "format": [FORMAT, VERSION],
        "source": source_sha256,
        "dataset": dataset_sha256,
        "rows": hashlib.sha256(np.ascontiguousarray(rows_N, "<i8").data).hexdigest(),
        "device": [device.type, "tf32" if tf32 else "float32"],
        "versions": [medpretrain.__version__, torch.__version__, timm.__version__, nvidia.dali.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(folder: Path) -> None:
    """Make the folder, for its owner alone: who has a network and a guess can tell an image from its features.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"the cache of features {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the cache of features {folder} cannot be written to")


def load(folder: Path, key: str, count: int) -> NDArray[np.float32] | None:
    """The features (count, D) kept under a key; None where there are none, or damaged ones, which is warned of."""
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            said = file.metadata() or {}
            features: NDArray[np.float32] = file.get_tensor("features")
    except (OSError, SafetensorError) as error:
        damage: str | None = str(error)
    else:
        damage = _damage(features, said, key, count)
    if damage is not None:
        _log.warning("%s is damaged (%s): the features are computed anew", path, damage)
        return None
    return features


def store(folder: Path, key: str, features_ND: NDArray[np.float32]) -> None:
    """Keep features; where the disk fails they are not kept, which is warned of: they are computed, and right."""
    said = {"format": FORMAT, "version": str(VERSION), "key": key, "sha256": _digest(features_ND)}
    path = _path(folder, key)
    try:
        with whole_file(path) as partial:
            save_file({"features": np.ascontiguousarray(features_ND)}, partial, said)
    except (OSError, SafetensorError) as error:
        _log.warning("the features are not kept: %s could not be written (%s)", path, error)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _digest(features: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(features).data).hexdigest()


def _damage(features: NDArray[np.float32], said: dict[str, str], key: str, count: int) -> str | None:
    if said.get("key") != key or said.get("sha256") != _digest(features):
        return "its SHA-256 is another"
    if features.dtype != np.float32 or features.ndim != 2 or len(features) != count:
        return f"it holds {features.dtype} {features.shape}"
    return None
