"""AMIMV: contrast of embeddings fused across two images, one normalised and one augmented (algorithm 1, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from medpretrain.data.batches import Batch, Views
from medpretrain.data.order import counterparts
from medpretrain.losses.contrastive import unit
from medpretrain.losses.gather import gather
from medpretrain.losses.instance import nt_xent
from medpretrain.methods.base import Backbone, Outputs, Progress, TrainingSet
from medpretrain.methods.momentum import MomentumEncoder, MomentumOptions
from medpretrain.models.heads import projection_mlp


class AmimvOptions(MomentumOptions):
    """The paper gives neither temperature, momentum nor fusion; these defaults are ours."""

    name: Literal["amimv"] = "amimv"
    temperature: Annotated[float, Gt(0)] = 0.2
    fusion: Literal["mean", "product", "concat"] = "mean"
    projector: tuple[int, ...] = (512, 512, 128)


class Amimv(MomentumEncoder):
    options = AmimvOptions
    view_kinds: ClassVar[Mapping[str, int]] = {"normalised": 1, "augmented": 1}
    exact_views: ClassVar[bool] = True
    opt: AmimvOptions

    def __init__(self, options: AmimvOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self._build(backbone, projection_mlp(backbone.num_features, options.projector))

    def split(self, views: Views) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Both views, the normalised first, for both encoders."""
        both = [views[name][0] for name in self.view_kinds]
        return both, both

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        partner = torch.from_numpy(counterparts(batch.seed, batch.step, batch.size)).to(outputs["query"].device)
        query_norm, query_aug = gather(outputs["query"]).unbind(dim=1)
        key_norm, key_aug = gather(outputs["key"]).unbind(dim=1)
        z1 = self._fuse(query_norm, query_aug[partner])
        z2 = self._fuse(key_aug, key_norm[partner])
        both = torch.stack([z1, z2])
        mine = both[:, batch.first : batch.first + len(outputs["query"])]
        return nt_xent(mine, temperature=self.opt.temperature, keys_VMD=both, first=batch.first)

    def _fuse(self, a_ND: Tensor, b_ND: Tensor) -> Tensor:
        """The operator the paper leaves open, on unit vectors, so that neither image outweighs the other."""
        a, b = unit(a_ND), unit(b_ND)
        if self.opt.fusion == "mean":
            return (a + b) / 2
        return a * b if self.opt.fusion == "product" else torch.cat([a, b], dim=1)
