"""MoCo v3: a view is told from all others of the batch by a slowly following encoder (Chen, Xie and He 2021)."""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.gather import gather
from medpretrain.losses.instance import info_nce
from medpretrain.methods.base import Backbone, Outputs, Progress, TrainingSet
from medpretrain.methods.momentum import Fraction, MomentumEncoder, MomentumOptions
from medpretrain.models.heads import projection_mlp


class MocoV3Options(MomentumOptions):
    """Defaults are the authors' for ResNet-50. For a Vision Transformer they have temperature 0.2, projector
    (4096, 4096, 256), predictor_norm and freeze_patch_embed."""

    name: Literal["moco_v3"] = "moco_v3"
    temperature: Annotated[float, Gt(0)] = 1.0
    momentum: Fraction = 0.99
    final_momentum: Fraction | None = 1.0
    projector: tuple[int, ...] = (4096, 256)
    predictor: tuple[int, ...] = (4096, 256)
    projector_norm: bool = True
    """Whether the projector ends in a BatchNorm without affine."""
    predictor_norm: bool = False
    """Whether the predictor does."""
    freeze_patch_embed: bool = False
    """A Vision Transformer's patches are projected at random for good, which keeps its training stable (section 4)."""


class MocoV3(MomentumEncoder):
    options = MocoV3Options
    opt: MocoV3Options

    def __init__(self, options: MocoV3Options, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        if options.freeze_patch_embed:
            _freeze_patch_embed(backbone)
        self._build(
            backbone,
            projection_mlp(backbone.num_features, options.projector, final_norm=options.projector_norm),
            projection_mlp(options.projector[-1], options.predictor, final_norm=options.predictor_norm),
        )

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        """Algorithm 1: 2T times InfoNCE, summed over the directions between views."""
        queries, keys = outputs["query"].unbind(dim=1), gather(outputs["key"].detach()).unbind(dim=1)
        own = torch.arange(batch.first, batch.first + len(queries[0]), device=queries[0].device)
        directions = [
            info_nce(queries[a], keys[b], own, temperature=self.opt.temperature)
            for a, b in permutations(range(len(queries)), 2)
        ]
        return 2 * self.opt.temperature * torch.stack(directions).sum()


def _freeze_patch_embed(backbone: nn.Module) -> None:
    embedding = getattr(backbone, "patch_embed", None)
    if not isinstance(embedding, nn.Module):
        raise UserError(
            "method.freeze_patch_embed=true needs a backbone that embeds patches, as vit_small_patch16_224 does; "
            "set it to false or change backbone.name"
        )
    embedding.requires_grad_(False)
