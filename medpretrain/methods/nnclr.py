"""NNCLR: an image's positive is the other view of its nearest neighbour among earlier ones (Dwibedi et al. 2021)."""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from medpretrain.data.batches import Batch, Views
from medpretrain.losses.gather import gather
from medpretrain.losses.instance import info_nce
from medpretrain.methods.base import Backbone, JointEmbedding, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.methods.momentum import refuse_a_short_queue
from medpretrain.models.heads import projection_mlp
from medpretrain.models.queue import Queue


class NnclrOptions(MethodOptions):
    """Defaults are the paper's."""

    name: Literal["nnclr"] = "nnclr"
    temperature: Annotated[float, Gt(0)] = 0.1
    projector: tuple[int, ...] = (2048, 2048, 256)
    projector_norm: bool = True
    """Whether the projector ends in a BatchNorm (ours has no affine)."""
    predictor: tuple[int, ...] = (4096, 256)
    queue: Annotated[int, Gt(0)] = 98304
    """Projections of earlier images among which a neighbour is looked for."""


class Nnclr(JointEmbedding):
    options = NnclrOptions
    one_pass: ClassVar[bool] = False

    def __init__(self, options: NnclrOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.backbone = backbone
        width = options.projector[-1]
        self.projector = projection_mlp(backbone.num_features, options.projector, final_norm=options.projector_norm)
        self.predictor = projection_mlp(width, options.predictor)
        self.queue = Queue(options.queue, width, seed=data.seed)

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        assert isinstance(options, NnclrOptions)
        refuse_a_short_queue(options, options.queue, global_batch)

    def forward(self, views: Views) -> Outputs:
        """`prediction` (n, V, D) with gradient, `z` (n, V, D) without, and `features`."""
        outputs = super().forward(views)
        predictions = [self.predictor(z) for z in outputs["z"].unbind(dim=1)]
        return {**outputs, "z": outputs["z"].detach(), "prediction": torch.stack(predictions, dim=1)}

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        """Equation 3 with predictions for keys, the mean over the directions between views."""
        z, predictions = outputs["z"].unbind(dim=1), gather(outputs["prediction"]).unbind(dim=1)
        own = torch.arange(batch.first, batch.first + len(z[0]), device=z[0].device)
        neighbours = [self.queue.nearest(one) for one in z]
        directions = [
            info_nce(neighbours[a], predictions[b], own, temperature=self.opt.temperature)
            for a, b in permutations(range(len(z)), 2)
        ]
        return torch.stack(directions).mean()

    @torch.no_grad()
    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        self.queue.push(gather(outputs["z"][:, 0]))
