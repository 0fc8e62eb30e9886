"""AMIMV: contrast of embeddings fused across two images, one normalised and one augmented (algorithm 1, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from medpretrain.data.batches import Batch, Views
from medpretrain.data.order import counterparts
from medpretrain.losses.contrastive import nt_xent
from medpretrain.losses.gather import gather
from medpretrain.methods.base import Backbone, Method, MethodOptions, Outputs, Progress
from medpretrain.models.ema import follow, frozen_copy
from medpretrain.models.heads import projection_mlp


class AmimvOptions(MethodOptions):
    """The paper gives neither temperature, momentum nor fusion; these defaults are ours."""

    name: Literal["amimv"] = "amimv"
    temperature: Annotated[float, Gt(0)] = 0.2
    momentum: Annotated[float, Ge(0), Le(1)] = 0.999
    fusion: Literal["mean", "product", "concat"] = "mean"
    projector: tuple[int, ...] = (512, 512, 128)


class Amimv(Method):
    options = AmimvOptions
    view_names = ("normalised", "augmented")

    def __init__(self, options: AmimvOptions, backbone: Backbone, label_sizes: Mapping[str, int]) -> None:
        super().__init__(options, backbone, label_sizes)
        self.opt = options
        self.encoder = nn.ModuleDict(
            {"backbone": backbone, "projector": projection_mlp(backbone.num_features, options.projector)}
        )
        self.momentum_encoder = frozen_copy(self.encoder)

    def forward(self, views: Views) -> Outputs:
        """`query` and `key` (n, 2, D): the normalised and the augmented view; `features` (n, D) of the normalised."""
        # Each view has a pass of its own, as in algorithm 1: BatchNorm does not mix the two kinds.
        both = [views[name][0] for name in self.view_names]
        features = [self.encoder["backbone"](images) for images in both]
        query = [self.encoder["projector"](one) for one in features]
        with torch.no_grad():
            key = [self._momentum_embedding(images) for images in both]
        return {
            "query": torch.stack(query, dim=1),
            "key": torch.stack(key, dim=1),
            "features": features[0].detach(),
        }

    def _momentum_embedding(self, images: Tensor) -> Tensor:
        encoder = self.momentum_encoder
        assert isinstance(encoder, nn.ModuleDict)
        embedding: Tensor = encoder["projector"](encoder["backbone"](images))
        return embedding

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
        a, b = (nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (a_ND, b_ND))
        if self.opt.fusion == "mean":
            return (a + b) / 2
        return a * b if self.opt.fusion == "product" else torch.cat([a, b], dim=1)

    def after_update(self, outputs: Outputs, progress: Progress) -> None:
        follow(self.momentum_encoder, self.encoder, self.opt.momentum)

    @property
    def exported(self) -> nn.Module:
        return self.encoder["backbone"]
