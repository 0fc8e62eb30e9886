"""What methods with a slowly following second encoder share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch, Views
from medpretrain.methods.base import Method, MethodOptions, Outputs, Progress
from medpretrain.models.ema import follow, frozen_copy
from medpretrain.training.schedules import cosine

Fraction = Annotated[float, Ge(0), Le(1)]


class MomentumOptions(MethodOptions):
    momentum: Fraction = 0.999
    final_momentum: Fraction | None = None
    """Reached at the end, on a cosine; None: the momentum stays."""


class MomentumEncoder(Method):
    """A trained encoder for queries, and a second one that follows it for keys.

    query = predictor(projector(backbone(view))) and key = the same of the following networks, without the predictor.
    Each view has a pass of its own, so BatchNorm sees one kind of view at a time.
    """

    view_kinds: ClassVar[Mapping[str, int]] = {"crop": 2}
    symmetric: ClassVar[bool] = True
    """Whether every view goes through both encoders; else the first is the query and the second the key."""
    collapse_causes: ClassVar[str] = "a lower optim.lr or a method.momentum nearer to 1 are the usual cures"
    opt: MomentumOptions

    def _build(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        self.encoder = nn.ModuleDict({"backbone": backbone, "projector": projector})
        self.momentum_encoder = frozen_copy(self.encoder)
        self.predictor = predictor or nn.Identity()

    def forward(self, views: Views) -> Outputs:
        """`query` and `key` (n, V, D), V = 1 where not symmetric, and `features` of the queries' encoder."""
        query_views, key_views = self.split(views)
        features = [self.encoder["backbone"](images) for images in query_views]
        query = [self.predictor(self.encoder["projector"](one)) for one in features]
        with torch.no_grad():
            key = [encode(self.momentum_encoder, images) for images in key_views]
        return {
            "query": torch.stack(query, dim=1),
            "key": torch.stack(key, dim=1),
            "features": torch.stack(features, dim=1).detach(),
        }

    def split(self, views: Views) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The views for the trained encoder and those for the one that follows."""
        crops = views["crop"]
        return (crops, crops) if self.symmetric else (crops[:1], crops[1:2])

    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        start, end = self.opt.momentum, self.opt.final_momentum
        momentum = start if end is None else cosine(progress.step, total=progress.total, start=start, end=end)
        follow(self.momentum_encoder, self.encoder, momentum)

    def embed(self, images: Tensor) -> Tensor:
        return encode(self.encoder, images)

    @property
    def exported(self) -> nn.Module:
        return self.encoder["backbone"]


def refuse_a_short_queue(options: MethodOptions, queue: int, global_batch: int) -> None:
    """Raises:
    UserError: the queue does not hold one batch.
    """
    if queue < global_batch:
        raise UserError(
            f"{options.name} puts {global_batch} embeddings a step into a queue of {queue}: set method.queue to at "
            f"least {global_batch}, or train.global_batch to at most {queue}"
        )


def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """The projection of n images, (n, D), by either encoder."""
    assert isinstance(encoder, nn.ModuleDict)
    embedding: Tensor = encoder["projector"](encoder["backbone"](images))
    return embedding
