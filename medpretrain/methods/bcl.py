"""BCL: balanced contrastive learning beside a classifier whose weights become prototypes (Zhu et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch, Views
from medpretrain.losses.balanced import balanced_contrastive
from medpretrain.losses.classification import cross_entropy, share_of_the_mean
from medpretrain.methods.base import Backbone, MethodOptions, Outputs, Progress, TrainingSet, image_first
from medpretrain.methods.class_prior import ClassPrior, refuse_a_single_class
from medpretrain.methods.supcon import Labelled, LabelledOptions


class BclOptions(LabelledOptions):
    """Defaults are the authors' for ImageNet-LT."""

    name: Literal["bcl"] = "bcl"
    projector: tuple[int, ...] = (2048, 1024)
    classification_weight: Annotated[float, Ge(0)] = 1.0
    """Of the logit-adjusted cross-entropy, alpha."""
    contrast_weight: Annotated[float, Ge(0)] = 0.35
    """Of the balanced contrast, beta."""


class Bcl(Labelled):
    options = BclOptions
    read_by_loss = ("classifier", "prototypes")
    opt: BclOptions

    def __init__(self, options: BclOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.prior = ClassPrior(data.counts[data.label])
        self.classifier = nn.Linear(backbone.num_features, len(self.prior))
        # The authors' MLP has BatchNorm, which leaves of two classes nothing but signs.
        hidden = backbone.num_features
        self.prototypes = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.width))

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        classes = refuse_a_single_class(options, data)
        if global_batch < classes:
            raise UserError(
                f"{options.name} balances {classes} classes within a batch of {global_batch}: set train.global_batch "
                f"to at least {classes}"
            )

    def forward(self, views: Views) -> Outputs:
        """`z` (n, V, D) and the class `logits` (n, V, C) with gradient, and `features`."""
        crops = views["crop"]
        features = self.backbone(torch.cat(crops))
        outputs = {"z": self.projector(features), "logits": self.classifier(features), "features": features.detach()}
        return {name: image_first(value, len(crops)) for name, value in outputs.items()}

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        contrast = super().loss(outputs, batch, progress)
        logits = outputs["logits"]
        images, views, _ = logits.shape
        labels_M = self.prior(batch.labels[self.data.label])
        own = labels_M[batch.first : batch.first + images].repeat_interleave(views)
        # Logits adjusted by the prior: equation 10 of Menon et al. 2021 with tau = 1.
        sums = cross_entropy(logits.flatten(0, 1) + self.prior.log_prior, own)
        classification = share_of_the_mean(sums, (labels_M >= 0).sum() * views, images / batch.size)
        return self.opt.classification_weight * classification + contrast

    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        return self.opt.contrast_weight * balanced_contrastive(
            z_VND,
            self.prior(batch.labels[self.data.label]),
            self.prototypes(self.classifier.weight),
            temperature=self.opt.temperature,
            keys_VMD=keys_VMD,
            first=batch.first,
        )
