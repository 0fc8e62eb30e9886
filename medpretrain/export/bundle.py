"""Write a backbone as a folder that plain timm loads, and prove that it computes the same features."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from data_prep.errors import UserError, WorkFailed
from medpretrain.export.card import Provenance, enlargement_note, model_card
from medpretrain.models.backbones import Stem, as_plain_timm_state, create_backbone
from medpretrain.models.preprocessing import Preprocessing

FORMAT = "medpretrain export"
FORMAT_VERSION = 1
WEIGHTS, CONFIG, PREPROCESSING, CARD = "model.safetensors", "config.json", "preprocessing.json", "README.md"
_BATCHES = (1, 2, 7)
_STEM_CONV = "conv1.weight"


class FeaturesDiffer(WorkFailed):
    """The folder, loaded back, does not compute what the trained backbone computes; nothing was written."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked."""

    out: Path
    features: int
    """D: the width of the output."""
    max_abs_difference: float
    """Of features between the trained backbone and the folder loaded by timm, over batches of 1, 2 and 7."""
    allowed_difference: float
    enlarged: bool
    """True for a 3x3 stem: images are to be enlarged twice."""
    sha256: dict[str, str]
    """By file name."""


def export(
    backbone: nn.Module,
    *,
    architecture: str,
    stem: Stem,
    channels: int,
    image_size: int,
    mean: list[float],
    std: list[float],
    name: str,
    provenance: Provenance,
    out: Path,
    bit_depth: int = 8,
    overwrite: bool = False,
) -> ExportReport:
    """Write OUT so that `timm.create_model("local-dir:OUT", pretrained=True)` gives the backbone.

    OUT holds model.safetensors, config.json, preprocessing.json and README.md. It is written beside OUT, loaded back
    through timm and compared on random images in float32 on the CPU, and only then renamed to OUT. The features must
    be equal; those of a 3x3 stem, which is stored as a 7x7 one for an enlarged image, may differ by 1e-5 of the
    largest feature (of 1, if that is smaller), for the two convolutions add in another order.

    Args:
        backbone: from `create_backbone`, on any device; left as it is.
        architecture: its timm name.
        stem: its stem.
        channels: its channels.
        image_size: pixels it was trained on.
        mean: one value a channel, of pixels in [0, 1].
        std: the same.
        name: what the model is to be called: letters, digits, dots, dashes, underscores.
        provenance: for the card.
        out: the folder.
        bit_depth: of the images; pixels were divided by 2 ** bit_depth - 1.
        overwrite: replace an earlier export. A crash between the two renames of a replacement leaves the earlier one
            whole under a hidden name beside OUT.

    Raises:
        UserError: OUT exists and is not an earlier export, or is one and overwrite is False; weights that do not fit
            the architecture or are not finite; a name or preprocessing that cannot be.
        FeaturesDiffer: the comparison failed.
    """
    preprocessing = Preprocessing(image_size, channels, tuple(mean), tuple(std), bit_depth)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
        raise UserError(f"the name {name!r} must be of letters, digits, dots, dashes and underscores")
    out = Path(out)
    _refuse_unless_free(out, overwrite)
    architecture = architecture.partition(".")[0]  # the tag names ImageNet's weights, not these
    plain = _plain_model(backbone, architecture, stem, channels, image_size)
    _claim_only_this_run(plain, architecture, stem, name, preprocessing)

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        config = {"medpretrain": {"format": FORMAT, "version": FORMAT_VERSION}}
        if stem == "3x3":
            config["medpretrain"]["input"] = enlargement_note(image_size)
        save_for_hf(plain, str(partial), model_config=config, safe_serialization=True)
        (partial / PREPROCESSING).write_text(json.dumps(_preprocessing_json(preprocessing, stem), indent=2) + "\n")
        features: Any = plain.num_features
        card = model_card(name, architecture, stem, features, preprocessing, provenance)
        (partial / CARD).write_text(card, encoding="utf-8")
        # safetensors makes its file readable by its owner alone; the card's mode is what the umask allows.
        (partial / WEIGHTS).chmod((partial / CARD).stat().st_mode)
        difference, allowed = _compare(backbone, partial, stem, preprocessing)
        report = ExportReport(
            out=out,
            features=features,
            max_abs_difference=difference,
            allowed_difference=allowed,
            enlarged=stem == "3x3",
            sha256={file.name: _settle(file) for file in sorted(partial.iterdir())},
        )
        _commit(partial, out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return report


def _refuse_unless_free(out: Path, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not _is_export(out):
        raise UserError(f"{out} exists and is not an earlier export; name a folder that does not exist")
    if not overwrite:
        raise UserError(f"{out} holds an earlier export; say overwrite to replace it")


def _is_export(folder: Path) -> bool:
    marked = folder / PREPROCESSING
    if folder.is_symlink() or not marked.is_file():
        return False
    try:
        content = json.loads(marked.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _plain_model(backbone: nn.Module, architecture: str, stem: Stem, channels: int, image_size: int) -> nn.Module:
    """timm's own model with the backbone's weights, in float32 on the CPU; no stochastic depth is carried over."""
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
    broken = [key for key, tensor in given.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"the weights hold values that are not finite: {broken[0]} (and {len(broken) - 1} more)")
    plain.load_state_dict(as_plain_timm_state(given, stem))
    return plain.eval()


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


def _preprocessing_json(preprocessing: Preprocessing, stem: Stem) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "size": preprocessing.size,
        "resize": "squash",
        "interpolation": "bilinear",
        "antialias": True,
        "channels": preprocessing.channels,
        "bit_depth": preprocessing.bit_depth,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "enlarge": {"factor": 2, "interpolation": "nearest"} if stem == "3x3" else None,
    }


def _compare(backbone: nn.Module, folder: Path, stem: Stem, preprocessing: Preprocessing) -> tuple[float, float]:
    """The largest difference and the allowed one."""
    # A copy in the layout and precision of the export: another layout would add in another order.
    trained = copy.deepcopy(backbone).to("cpu", torch.float32)
    trained.to(memory_format=torch.contiguous_format).eval()
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    generator = torch.Generator().manual_seed(0)
    difference, largest = 0.0, 1.0
    with torch.inference_mode():
        for n in _BATCHES:
            images = torch.randn(n, preprocessing.channels, preprocessing.size, preprocessing.size, generator=generator)
            expected: Tensor = trained(images)
            got: Tensor = loaded(nn.functional.interpolate(images, scale_factor=2) if stem == "3x3" else images)
            if got.shape != expected.shape or not torch.isfinite(expected).all():
                raise FeaturesDiffer(f"features {tuple(got.shape)} and {tuple(expected.shape)}, or not finite")
            difference = max(difference, (got - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    allowed = 1e-5 * largest if stem == "3x3" else 0.0
    if not difference <= allowed:
        raise FeaturesDiffer(f"the features of the export differ by {difference:.3g}; {allowed:.3g} is allowed")
    return difference, allowed


def _settle(file: Path) -> str:
    """Bring a file to the disk, so that the rename never shows one that a power cut empties; its SHA-256."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


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
