"""Supervised Prototypes: two fixed, opposite points attract a class each (Mildenberger et al. 2025, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.contrastive import unit
from medpretrain.losses.supervised import supervised_prototypes
from medpretrain.methods.base import Backbone, MethodOptions, Progress, TrainingSet
from medpretrain.methods.supcon import Labelled, LabelledOptions
from medpretrain.methods.supervised_minority import minority_and_majority


class SupervisedPrototypesOptions(LabelledOptions):
    """The threshold is the paper's; temperature and widths are those of the authors' code: the paper has neither."""

    name: Literal["supervised_prototypes"] = "supervised_prototypes"
    threshold: Annotated[float, Ge(-1), Le(1)] = 0.5
    """The cosine with the prototype of its class up to which an embedding is pulled to it."""


class SupervisedPrototypes(Labelled):
    """Prototypes are placed once, before the first step.

    Buffers:
        prototypes: (C, D), one a class; zeros before they are placed, and always for classes without images.
    """

    options = SupervisedPrototypesOptions
    opt: SupervisedPrototypesOptions
    prototypes: Tensor

    def __init__(self, options: SupervisedPrototypesOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.minority, self.majority = minority_and_majority(options, data)
        self.register_buffer("prototypes", torch.zeros(data.label_sizes[data.label], self.width))

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        minority_and_majority(options, data)

    def wants_survey(self, progress: Progress) -> bool:
        return progress.step == 0

    def survey(self, embeddings_ND: Tensor, labels: Mapping[str, Tensor]) -> None:
        """The majority's prototype goes where all images are near, of whatever class; the minority's opposite."""
        place = spherical_median(embeddings_ND)
        self.prototypes[self.majority] = place.to(self.prototypes.dtype)
        self.prototypes[self.minority] = -self.prototypes[self.majority]

    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        return supervised_prototypes(
            z_VND,
            batch.labels[self.data.label],
            self.prototypes,
            temperature=self.opt.temperature,
            threshold=self.opt.threshold,
            keys_VMD=keys_VMD,
            first=batch.first,
        )


def spherical_median(
    x_ND: Tensor, *, iterations: int = 1000, tolerance: float = 1e-9, softening: float = 1e-6
) -> Tensor:
    """A point on the unit sphere of least mean Euclidean distance to the directions of N vectors, (D,) in float64.

    Weiszfeld's iteration (1937) kept on the sphere: p <- unit(sum_n z_n / |p - z_n|). It is the projected gradient
    descent the paper speaks of, with a step of 1 / sum_n |p - z_n|^-1. This step minimises an upper bound of the sum,
    |q - z| <= (|q - z|^2 / |p - z| + |p - z|) / 2, which is exact at q = p; so the mean distance never grows (an MM
    algorithm, Hunter and Lange 2004), without a rate to tune, and the same embeddings always give the same point. It
    starts from the direction of the mean, which has the least mean squared distance. On a sphere there may be other
    minima; it finds the one below its start.

    Args:
        x_ND: any scale.
        iterations: at most.
        tolerance: of the last step.
        softening: lengths are sqrt(|p - z|^2 + softening^2), so that a vector at p itself has a finite weight; the mean
            distance is within this of the minimum's.

    >>> x = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [-1.0, 0.3]])
    >>> [round(value, 6) for value in spherical_median(x).tolist()]  # the mean leans to the fourth, the median does not
    [1.0, 0.0]
    """
    z = unit(x_ND.double())
    mean = z.mean(dim=0)
    point = unit(mean if mean.norm() > tolerance else z[0])
    for _ in range(iterations):
        squared = (2 - 2 * (z @ point)).clamp(min=0)
        moved = unit(z.T @ (squared + softening**2).rsqrt())
        step = (moved - point).norm()
        point = moved
        if step < tolerance:
            break
    return point
