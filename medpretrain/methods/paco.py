"""PaCo: contrast with a queue of labelled keys and with learnable class centres (Cui et al. 2021)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from medpretrain.data.batches import Batch, Views
from medpretrain.losses.balanced import parametric_contrastive
from medpretrain.losses.contrastive import at_least_float32
from medpretrain.losses.gather import gather
from medpretrain.methods.base import Backbone, LabelKinds, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.methods.class_prior import ClassPrior, refuse_a_single_class
from medpretrain.methods.momentum import MomentumEncoder, MomentumOptions, encode, refuse_a_short_queue
from medpretrain.models.heads import projection_mlp
from medpretrain.models.queue import Queue


class PacoOptions(MomentumOptions):
    """Defaults are the authors' for ImageNet-LT."""

    name: Literal["paco"] = "paco"
    temperature: Annotated[float, Gt(0)] = 0.2
    queue: Annotated[int, Gt(0)] = 8192
    key_weight: Annotated[float, Gt(0)] = 0.05
    """Of each key of the same class, alpha."""
    centre_weight: Annotated[float, Gt(0)] = 1.0
    """Of the centre of the own class, beta."""
    projector: tuple[int, ...] = (2048, 128)


class Paco(MomentumEncoder):
    options = PacoOptions
    labels: ClassVar[LabelKinds] = "one"
    exact_views: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    opt: PacoOptions

    def __init__(self, options: PacoOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.data = data
        self._build(backbone, projection_mlp(backbone.num_features, options.projector))
        self.prior = ClassPrior(data.counts[data.label])
        self.centres = nn.Linear(backbone.num_features, len(self.prior))
        self.queue = Queue(options.queue, options.projector[-1], seed=data.seed)

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        assert isinstance(options, PacoOptions)
        refuse_a_single_class(options, data)
        refuse_a_short_queue(options, options.queue, global_batch)

    def forward(self, views: Views) -> Outputs:
        """`query` and `key` (n, 1, D), the class `logits` (n, C) of the query's view, and its `features`."""
        (query_images,), (key_images,) = self.split(views)
        features = self.encoder["backbone"](query_images)
        with torch.no_grad():
            key = encode(self.momentum_encoder, key_images)
        return {
            "query": self.encoder["projector"](features)[:, None],
            "key": key[:, None],
            "logits": self.centres(features),
            "features": features[:, None].detach(),
        }

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        query = outputs["query"][:, 0]
        labels_M = self.prior(batch.labels[self.data.label])
        mine = torch.arange(batch.first, batch.first + len(query), device=query.device)
        return parametric_contrastive(
            query,
            [gather(outputs["key"][:, 0].detach()), self.queue.embeddings],
            at_least_float32(outputs["logits"]) + self.prior.log_prior,
            labels_M[mine],
            torch.cat([labels_M, self.queue.labels]),
            mine,
            temperature=self.opt.temperature,
            key_weight=self.opt.key_weight,
            centre_weight=self.opt.centre_weight,
        )

    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        super().after_update(outputs, batch, progress)
        self.queue.push(gather(outputs["key"][:, 0]), self.prior(batch.labels[self.data.label]))
