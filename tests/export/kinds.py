"""Small backbones of every kind that an export must hold, and how tests export them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from medpretrain.export.bundle import ExportReport, export
from medpretrain.export.provenance import Provenance
from medpretrain.models.backbones import create_backbone

ALL: dict[str, Any] = {"forms": ("timm", "onnx", "pt2")}
KINDS: dict[str, dict[str, Any]] = {
    "3x3 grey": {"architecture": "resnet18", "stem": "3x3", "channels": 1, "image_size": 32, **ALL},
    "3x3 colour": {"architecture": "resnet18", "stem": "3x3", "channels": 3, "image_size": 32},
    "resnet": {"architecture": "resnet10t", "stem": "timm", "channels": 1, "image_size": 32, "bit_depth": 16, **ALL},
    "vit": {"architecture": "vit_tiny_patch16_224", "stem": "timm", "channels": 1, "image_size": 64, **ALL},
}
MEAN, STD = [0.21, 0.22, 0.23], [0.31, 0.32, 0.33]
PROVENANCE = Provenance(
    method="dino",
    recipe_name="configs/retina/dino_weak.yaml",
    recipe_sha256="1" * 64,
    dataset_sha256=("2" * 64, "3" * 64),
    dataset_counts={"train": 200, "test": 40},
    checkpoint_sha256="4" * 64,
    step=1000,
    images_seen=256_000,
    medpretrain_version="0.1.0",
    torch_version=torch.__version__,
)


def trained(architecture: str, stem: Any, channels: int, image_size: int, **_: Any) -> nn.Module:
    """A backbone whose weights and batch statistics are not those it starts with."""
    torch.manual_seed(2)
    backbone = create_backbone(architecture, channels=channels, stem=stem, image_size=image_size, drop_path=0.1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for _ in range(2):
            backbone(torch.randn(4, channels, image_size, image_size))
    return backbone


def exported(backbone: nn.Module, out: Path, kind: dict[str, Any], **changes: Any) -> ExportReport:
    """The form `timm` alone, which takes a second, unless the kind says more."""
    channels = kind["channels"]
    statistics = {"mean": MEAN[:channels], "std": STD[:channels]}
    settings = {"forms": ("timm",), "name": "demo-v1", "provenance": PROVENANCE, "out": out, **kind, **statistics}
    return export(backbone, **{**settings, **changes})
