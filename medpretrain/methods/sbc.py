"""SBC: contrast by sub-classes as large as the smallest class, found anew as training goes on (Hou et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.balanced import subclass_contrastive
from medpretrain.methods.base import Backbone, MethodOptions, Progress, TrainingSet
from medpretrain.methods.class_prior import refuse_a_single_class
from medpretrain.methods.subclasses import balanced_subclasses
from medpretrain.methods.supcon import Labelled, LabelledOptions

_ROUNDING = 1e-9
"""Epochs; much more than the rounding of one, much less than the share of it that an image is."""


class SbcOptions(LabelledOptions):
    """Defaults are the authors' for CIFAR-LT."""

    name: Literal["sbc"] = "sbc"
    temperature: Annotated[float, Gt(0)] = 0.1
    class_weight: Annotated[float, Ge(0)] = 0.25
    """Of the term that holds the sub-classes of a class together, beta."""
    class_temperature: Annotated[float, Gt(0)] | None = None
    """Of that term; None: `temperature`."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """SupCon until then."""
    every_epochs: Annotated[float, Gt(0)] = 10.0
    """Between two searches for sub-classes."""
    smallest_subclass: Annotated[int, Gt(0)] = 10
    """Images that a sub-class aims at where the smallest class has fewer, delta."""


class Sbc(Labelled):
    options = SbcOptions
    opt: SbcOptions
    subclasses: Tensor
    surveyed: Tensor

    def __init__(self, options: SbcOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.register_buffer("subclasses", torch.full((data.samples,), -1))
        self.register_buffer("surveyed", torch.tensor(False))

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        refuse_a_single_class(options, data)

    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels[self.data.label]
        # Until sub-classes are known, the class is the only one and the second term is left out: SupCon.
        return subclass_contrastive(
            z_VND,
            labels,
            torch.where(self.surveyed, self.subclasses[batch.samples], labels),
            temperature=self.opt.temperature,
            class_weight=self.opt.class_weight * self.surveyed,
            class_temperature=self.opt.class_temperature,
            keys_VMD=keys_VMD,
            first=batch.first,
        )

    def wants_survey(self, progress: Progress) -> bool:
        """At the first step after the warm-up, and at the first of each interval from there on."""
        if progress.step == 0:
            return self._interval(0.0) >= 0
        before = progress.epoch * (progress.step - 1) / progress.step
        return self._interval(progress.epoch) > max(-1, self._interval(before))

    def _interval(self, epoch: float) -> int:
        """Which interval an epoch is in; negative during the warm-up."""
        return math.floor((epoch - self.opt.warmup_epochs + _ROUNDING) / self.opt.every_epochs)

    def survey(self, embeddings_ND: Tensor, labels: Mapping[str, Tensor]) -> None:
        self.subclasses.copy_(
            balanced_subclasses(
                embeddings_ND, labels[self.data.label], smallest=self.opt.smallest_subclass, seed=self.data.seed
            )
        )
        self.surveyed.fill_(True)
