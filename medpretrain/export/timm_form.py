"""The form `timm`: a folder for `timm.create_model("local-dir:OUT", pretrained=True)`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.export.description import FORMAT, FORMAT_VERSION, WEIGHTS
from medpretrain.models.backbones import Stem, as_plain_timm_state, create_backbone
from medpretrain.models.preprocessing import Preprocessing

_STEM_CONV = "conv1.weight"


def checked_state(
    backbone: nn.Module, architecture: str, stem: Stem, channels: int, image_size: int
) -> dict[str, Tensor]:
    """The backbone's weights on the CPU.

    Raises:
        UserError: they do not fit the architecture, or are not finite.
    """
    plain = create_backbone(architecture, channels=channels, image_size=image_size)
    expected = {key: tuple(tensor.shape) for key, tensor in plain.state_dict().items()}
    if stem == "3x3":
        if len(expected.get(_STEM_CONV, ())) != 4:
            raise UserError(f"{architecture} has no 3x3 stem")
        expected[_STEM_CONV] = (*expected[_STEM_CONV][:2], 3, 3)
    given = {key: tensor.detach().cpu() for key, tensor in backbone.state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in given.items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if expected.get(key) != shapes.get(key):
            raise UserError(
                f"the weights are not those of {architecture} (stem {stem}, {channels} channels, {image_size} pixels): "
                f"{key} is {shapes.get(key, 'missing')}, not {expected.get(key, 'expected')}"
            )
    refuse_not_finite(given, "the weights")
    return given


def refuse_not_finite(state: dict[str, Tensor], what: str) -> None:
    """Raises:
    UserError: names the first tensor with a NaN or an infinity.
    """
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{what} hold values that are not finite: {broken[0]} (and {len(broken) - 1} more)")


def write_timm(
    folder: Path,
    state: dict[str, Tensor],
    *,
    architecture: str,
    stem: Stem,
    name: str,
    preprocessing: Preprocessing,
    metadata: dict[str, str],
) -> int:
    """Write model.safetensors and config.json; gives the number of features.

    Args:
        folder: is made.
        state: of a backbone with this stem.
        architecture: timm's name.
        stem: a 3x3 one is stored as the 7x7 one of an image enlarged twice.
        name: becomes the tag of the weights.
        preprocessing: for timm's own transforms.
        metadata: for the header of the safetensors file.
    """
    plain = create_backbone(architecture, channels=preprocessing.channels, image_size=preprocessing.size)
    plain.load_state_dict(as_plain_timm_state(state, stem))
    _claim_only_this_run(plain, architecture, stem, name, preprocessing)
    config = {"medpretrain": {"format": FORMAT, "version": FORMAT_VERSION}}
    if stem == "3x3":
        config["medpretrain"]["input"] = enlargement_note(preprocessing.size)
    save_for_hf(plain, str(folder), model_config=config, safe_serialization=True)
    # Again, for timm's writer takes no metadata; `format` is what transformers and others look for.
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", **metadata})
    _sort_header(folder / WEIGHTS)
    features: Any = plain.num_features
    return int(features)


def load_timm(folder: Path) -> nn.Module:
    """As a reader loads it."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def enlargement_note(size: int) -> str:
    """Why the timm form of a 3x3 stem asks for images twice as large, for the card and the config."""
    return (
        f"trained on {size} x {size} pixels with a 3x3 first convolution of stride 1, stored as an equal 7x7 one of "
        f"stride 2: prepare the image at {size} x {size}, then repeat each pixel twice in both directions (2x, nearest)"
    )


def _sort_header(file: Path) -> None:
    """safetensors writes its metadata in an order of chance; the same export is to have the same bytes."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, "JSON written in another way"
        opened.seek(8)
        opened.write(text)


def _claim_only_this_run(
    plain: nn.Module, architecture: str, stem: Stem, name: str, preprocessing: Preprocessing
) -> None:
    """A model from scratch carries the tag, licence, mean and std of timm's ImageNet weights: replace them all."""
    inherited: Any = plain.pretrained_cfg
    side = preprocessing.size * (2 if stem == "3x3" else 1)
    config: dict[str, Any] = {
        "architecture": architecture,
        "tag": name,
        "custom_load": False,
        "input_size": (preprocessing.channels, side, side),
        "fixed_input_size": inherited.get("fixed_input_size", False),
        "interpolation": "nearest" if stem == "3x3" else "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": inherited.get("first_conv"),
        "classifier": inherited.get("classifier"),
        "license": "other",
    }
    plain.pretrained_cfg = plain.default_cfg = config  # type: ignore[assignment]
