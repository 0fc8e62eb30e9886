"""ModAn-MulSupCon: multi-label supervised contrastive learning on modality and anatomy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from medpretrain.data.batches import Batch, Views
from medpretrain.losses.contrastive import mul_sup_con, multi_hot
from medpretrain.losses.gather import gather
from medpretrain.methods.base import Backbone, Method, MethodOptions, Outputs, Progress
from medpretrain.models.heads import projection_mlp


class MulSupConOptions(MethodOptions):
    """Defaults are the paper's (table 2)."""

    name: Literal["modan_mulsupcon"] = "modan_mulsupcon"
    temperature: Annotated[float, Gt(0)] = 0.07
    threshold: Annotated[float, Gt(0), Le(1)] = 0.3
    """Jaccard similarity from which a pair is positive; with one modality and one anatomy it is 0, 1/3 or 1."""
    projector: tuple[int, ...] = ()
    """Widths of an MLP behind the backbone; none in the paper."""


class ModAnMulSupCon(Method):
    options = MulSupConOptions
    view_names = ("crop",)
    needs_labels = True

    def __init__(self, options: MulSupConOptions, backbone: Backbone, label_sizes: Mapping[str, int]) -> None:
        super().__init__(options, backbone, label_sizes)
        self.opt = options
        self.label_sizes = dict(label_sizes)
        self.backbone = backbone
        widths = options.projector
        self.projector = projection_mlp(backbone.num_features, widths) if widths else nn.Identity()

    def forward(self, views: Views) -> Outputs:
        """`z` (n, V, D) and the `features` (n, D) of the first view."""
        n = len(views["crop"][0])
        features = self.backbone(torch.cat(views["crop"]))
        z = self.projector(features)
        return {"z": z.unflatten(0, (-1, n)).transpose(0, 1), "features": features[:n].detach()}

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        labels = multi_hot([batch.labels[name] for name in self.label_sizes], list(self.label_sizes.values()))
        return mul_sup_con(
            outputs["z"].transpose(0, 1),
            labels,
            temperature=self.opt.temperature,
            threshold=self.opt.threshold,
            keys_VMD=gather(outputs["z"]).transpose(0, 1),
            first=batch.first,
        )

    @property
    def exported(self) -> nn.Module:
        return self.backbone
