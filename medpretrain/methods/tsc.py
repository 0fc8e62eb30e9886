"""TSC: KCL with a pull of each class to a place of its own, all places far apart (Li et al. 2022)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.contrastive import unit
from medpretrain.losses.gather import gather
from medpretrain.losses.k_positive import Targets, match, uniform_targets
from medpretrain.losses.supervised import multi_hot
from medpretrain.methods.base import Backbone, Outputs, Progress, TrainingSet
from medpretrain.methods.kcl import Kcl, KPositiveOptions


class TscOptions(KPositiveOptions):
    name: Literal["tsc"] = "tsc"
    target_weight: Annotated[float, Ge(0)] = 0.2
    """Lambda, of the pull to the class's target."""
    center_momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    """Of the classes' centres, by which targets are given to classes."""
    match_every: Annotated[int, Ge(1)] = 1
    """Steps between two matchings; one takes 1 ms for 165 classes, 50 ms for 1000."""


class Tsc(Kcl):
    """Targets stay where they are; which class has which follows the centres of the classes.

    Attributes:
        targets: (C, D), of length 1.
        centers: (C, D), of length 1: moving means of the queries of each class; 0 for one not seen yet.
        target_of_class: (C,) int64, a permutation.
    """

    options: ClassVar[type[KPositiveOptions]] = TscOptions
    opt: TscOptions
    targets: Tensor
    centers: Tensor
    target_of_class: Tensor

    def __init__(self, options: TscOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        classes = data.label_sizes[data.label]
        targets = uniform_targets(classes, options.projector[-1], data.seed)
        self.register_buffer("targets", targets.float())
        self.register_buffer("centers", torch.zeros_like(self.targets))
        self.register_buffer("target_of_class", torch.arange(classes))

    def pull(self, labels_A: Tensor) -> Targets | None:
        return Targets(self.targets[self.target_of_class], labels_A, self.opt.target_weight)

    @torch.no_grad()
    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        super().after_update(outputs, batch, progress)
        queries = unit(gather(outputs["query"][:, 0])).to(self.centers.dtype)
        # A product and not a scattered sum, which a GPU adds up in any order: ranks must agree to the last bit.
        member = multi_hot([batch.labels[self.data.label]], [len(self.centers)]).to(queries.dtype)
        means = unit(member.T @ queries)
        moved = unit(self.centers.lerp(means, 1 - self.opt.center_momentum))
        self.centers.copy_(torch.where(member.any(dim=0)[:, None], moved, self.centers))
        if batch.step % self.opt.match_every == 0:
            self.target_of_class.copy_(match(self.centers, self.targets))
