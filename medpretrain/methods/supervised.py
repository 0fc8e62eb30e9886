"""Supervised pretraining by cross-entropy, weighted or focal: the baseline of the papers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch, Views
from medpretrain.losses.classification import (
    binary_cross_entropy,
    cross_entropy,
    effective_number,
    inverse_frequency,
    share_of_the_mean,
)
from medpretrain.losses.supervised import multi_hot
from medpretrain.methods.base import (
    Backbone,
    LabelKinds,
    Method,
    MethodOptions,
    Outputs,
    Progress,
    TrainingSet,
    image_first,
)


class SupervisedOptions(MethodOptions):
    name: Literal["supervised"] = "supervised"
    loss: Literal["cross_entropy", "binary"] = "cross_entropy"
    """cross_entropy: a softmax over the classes of each label kind, averaged over kinds. binary: the classes of all
    kinds are one vector of bits, each a problem of its own."""
    weighting: Literal["none", "inverse", "effective"] = "none"
    """By the images of each class: N / (C n_c), or by the effective number of samples (Cui et al. 2019)."""
    beta: Annotated[float, Ge(0), Lt(1)] = 0.9999
    """Of the effective number of samples."""
    focusing: Annotated[float, Ge(0)] = 0.0
    """Gamma of the focal loss, 2 in its paper; 0 is the plain cross-entropy."""


class Supervised(Method):
    """A backbone and a linear head for each label kind; the heads are thrown away afterwards.

    Several views of an image are several samples of its labels, so the loss is their mean.
    """

    options = SupervisedOptions
    view_kinds: ClassVar = {"crop": 1}
    labels: ClassVar[LabelKinds] = "some"
    weights: Tensor

    def __init__(self, options: SupervisedOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.backbone = backbone
        self.sizes = data.label_sizes
        self.heads = nn.ModuleList(nn.Linear(backbone.num_features, size) for size in self.sizes.values())
        weights = [weight for kind in self.sizes for weight in class_weights(options, data.counts[kind])]
        self.register_buffer("weights", torch.tensor(weights), persistent=False)  # they follow from the counts

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        for kind, counts in data.counts.items():
            if sum(count > 0 for count in counts) < 2:
                only = next(name for name, count in zip(data.classes[kind], counts, strict=True) if count)
                raise UserError(
                    f"all images of the training split with a label {kind!r} are {only!r}, and {options.name} needs "
                    "two classes to tell apart; give another data.labels"
                )

    def forward(self, views: Views) -> Outputs:
        """`logits` (n, V, C), of the classes of all kinds one after another, and `features`."""
        crops = views["crop"]
        features = self.backbone(torch.cat(crops))
        logits = torch.cat([head(features) for head in self.heads], dim=1)
        return {"logits": image_first(logits, len(crops)), "features": image_first(features, len(crops)).detach()}

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        logits_nVC = outputs["logits"]
        own = slice(batch.first, batch.first + len(logits_nVC))
        ids = [batch.labels[kind] for kind in self.sizes]
        if self.opt.loss == "binary":
            return self._binary(logits_nVC, multi_hot_or_unknown(ids, list(self.sizes.values())), own)
        sizes = list(self.sizes.values())
        parts = zip(logits_nVC.split(sizes, dim=2), ids, self.weights.split(sizes), strict=True)
        return torch.stack([self._softmax(logits, labels, own, weights) for logits, labels, weights in parts]).mean()

    def _softmax(self, logits_nVC: Tensor, labels_M: Tensor, own: slice, weights_C: Tensor) -> Tensor:
        views = logits_nVC.shape[1]
        labels = labels_M[own].repeat_interleave(views)
        sums = cross_entropy(logits_nVC.flatten(0, 1), labels, class_weights_C=weights_C, focusing=self.opt.focusing)
        total = torch.where(labels_M >= 0, weights_C[labels_M.clamp(min=0)], 0.0).sum()
        return share_of_the_mean(sums, total * views, len(logits_nVC) / len(labels_M))

    def _binary(self, logits_nVC: Tensor, targets_MC: Tensor, own: slice) -> Tensor:
        views = logits_nVC.shape[1]
        targets = targets_MC[own].repeat_interleave(views, dim=0)
        sums = binary_cross_entropy(
            logits_nVC.flatten(0, 1), targets, positive_weights_C=self.weights, focusing=self.opt.focusing
        )
        return share_of_the_mean(sums, (targets_MC >= 0).sum() * views, len(logits_nVC) / len(targets_MC))

    @property
    def exported(self) -> nn.Module:
        return self.backbone


def class_weights(options: SupervisedOptions, counts: tuple[int, ...]) -> list[float]:
    """The weight of each class of a label kind; for `binary` that of its bit where it is 1, against 1 where it is 0.

    A bit is a problem of two classes, the images that have it and those that do not, so its weight is the ratio of
    theirs. The weight of a class without images has no effect.
    """

    def weights(of: tuple[int, ...]) -> list[float]:
        if options.weighting == "none":
            return [1.0] * len(of)
        return inverse_frequency(of) if options.weighting == "inverse" else effective_number(of, options.beta)

    if options.loss == "cross_entropy":
        return weights(counts)
    return [on / off if off else on for on, off in (weights((count, sum(counts) - count)) for count in counts)]


def multi_hot_or_unknown(ids: list[Tensor], sizes: list[int]) -> Tensor:
    """As `multi_hot`, with -1 in all bits of a kind whose label is unknown.

    >>> multi_hot_or_unknown([torch.tensor([1, -1]), torch.tensor([0, 0])], [2, 2]).tolist()
    [[0, 1, 1, 0], [-1, -1, 1, 0]]
    """
    known = torch.cat([(kind >= 0)[:, None].expand(-1, size) for kind, size in zip(ids, sizes, strict=True)], dim=1)
    return torch.where(known, multi_hot(ids, sizes), -1)
