"""ReSSL: a strongly augmented view relates to earlier images as a weakly augmented one does (Zheng et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from medpretrain.data.batches import Batch, Views
from medpretrain.losses.gather import gather
from medpretrain.losses.instance import relational
from medpretrain.methods.base import Backbone, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.methods.momentum import MomentumEncoder, MomentumOptions, refuse_a_short_queue
from medpretrain.models.heads import projection_mlp
from medpretrain.models.queue import Queue


class ReSslOptions(MomentumOptions):
    """Defaults are the paper's for ImageNet, momentum 0.999 too."""

    name: Literal["ressl"] = "ressl"
    temperature: Annotated[float, Gt(0)] = 0.1
    teacher_temperature: Annotated[float, Gt(0)] = 0.04
    projector: tuple[int, ...] = (4096, 512)
    queue: Annotated[int, Gt(0)] = 131072
    """The teacher's embeddings of earlier images, to which views are related."""


class ReSsl(MomentumEncoder):
    options = ReSslOptions
    view_kinds: ClassVar[Mapping[str, int]] = {"strong": 1, "weak": 1}
    opt: ReSslOptions

    def __init__(self, options: ReSslOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self._build(backbone, projection_mlp(backbone.num_features, options.projector, norm=False))
        self.queue = Queue(options.queue, options.projector[-1], seed=data.seed)

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        assert isinstance(options, ReSslOptions)
        refuse_a_short_queue(options, options.queue, global_batch)

    def split(self, views: Views) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The student sees the strong views, the teacher the weak ones."""
        return views["strong"], views["weak"]

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        """The mean over pairs of a strong and a weak view."""
        pairs = [
            relational(
                student,
                teacher,
                self.queue.embeddings,
                temperature=self.opt.temperature,
                teacher_temperature=self.opt.teacher_temperature,
            )
            for student in outputs["query"].unbind(dim=1)
            for teacher in outputs["key"].unbind(dim=1)
        ]
        return torch.stack(pairs).mean()

    @torch.no_grad()
    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        super().after_update(outputs, batch, progress)
        self.queue.push(gather(outputs["key"][:, 0]))
