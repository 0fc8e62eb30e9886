"""An export as a backbone again: what evaluation and fine-tuning start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_prep.dataset import file_sha256
from data_prep.errors import UserError
from medpretrain.export.description import CONFIG, PREPROCESSING, WEIGHTS, Description, read_description, read_json
from medpretrain.export.timm_form import refuse_not_finite
from medpretrain.models.backbones import Stem, create_backbone
from medpretrain.models.preprocessing import Preprocessing

_STEM_CONV = "conv1.weight"


@dataclass(frozen=True)
class LoadedExport:
    """An export, opened."""

    name: str
    backbone: nn.Module
    """On the CPU, in eval mode: preprocessed images (n, C, S, S) to features (n, D). A 3x3 stem is one again, so images
    are not enlarged."""
    architecture: str
    stem: Stem
    preprocessing: Preprocessing
    provenance: dict[str, str]
    """As in the header of model.safetensors: `recipe_sha256`, `dataset_sha256`, `checkpoint_sha256`, `step`, ...; what
    is not known is not there."""
    description: Description


def read_bundle(folder: Path) -> LoadedExport:
    """Open an export.

    Raises:
        UserError: no export; one that a newer medpretrain made; one that is damaged or was changed; weights that are
            not finite.
    """
    description = read_description(folder)
    config = read_json(folder / CONFIG)
    try:
        architecture, name = str(config["architecture"]), str(config["pretrained_cfg"]["tag"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} was changed: it has no architecture or no pretrained_cfg.tag") from None
    preprocessing = description.preprocessing
    backbone = create_backbone(
        architecture, channels=preprocessing.channels, stem=description.stem, image_size=preprocessing.size
    )
    state, header = _read_weights(folder / WEIGHTS, description.weights_sha256)
    refuse_not_finite(state, f"the weights of {folder}")
    _load(backbone, state, description.stem, folder)
    provenance = {key: value for key, value in header.items() if key not in ("format", "preprocessing", "export")}
    return LoadedExport(name, backbone.eval(), architecture, description.stem, preprocessing, provenance, description)


def _read_weights(path: Path, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: the export is not whole without it")
    if sha256 is not None and file_sha256(path) != sha256:
        raise UserError(f"{path} is not the file that was exported: its SHA-256 is not the one in {PREPROCESSING}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _load(backbone: nn.Module, state: dict[str, Tensor], stem: Stem, folder: Path) -> None:
    changed = f"{folder / WEIGHTS} does not hold the weights that {CONFIG} and {PREPROCESSING} announce"
    if stem == "3x3" and _STEM_CONV in state:
        state[_STEM_CONV] = _stem_again(state[_STEM_CONV], changed)
    shapes = {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key in sorted(shapes.keys() | found.keys()):
        if shapes.get(key) != found.get(key):
            raise UserError(f"{changed}: {key} is {found.get(key, 'missing')}, not {shapes.get(key, 'expected')}")
    backbone.load_state_dict(state)


def _stem_again(stored: Tensor, changed: str) -> Tensor:
    """The 3x3 kernel in a 7x7 one that is zero at its even taps; see `as_plain_timm_state`."""
    if stored.shape[2:] != (7, 7):
        raise UserError(f"{changed}: {_STEM_CONV} is {tuple(stored.shape)}")
    kernel = stored[:, :, 1::2, 1::2].contiguous()
    rest = stored.clone()
    rest[:, :, 1::2, 1::2] = 0
    if torch.any(rest):
        raise UserError(f"{changed}: {_STEM_CONV} was trained further after the export; use it as a plain timm model")
    return kernel
