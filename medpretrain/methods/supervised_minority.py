"""Supervised Minority: labels of the rarer class alone (Mildenberger et al. 2025, section 4.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.supervised import supervised_minority
from medpretrain.methods.base import Backbone, MethodOptions, TrainingSet
from medpretrain.methods.supcon import Labelled, LabelledOptions

_NAMED = 5
"""Classes that an error names before it counts the rest."""


class SupervisedMinorityOptions(LabelledOptions):
    """Temperature and widths are those of the authors' code, for the paper has neither."""

    name: Literal["supervised_minority"] = "supervised_minority"


class SupervisedMinority(Labelled):
    """SupCon would pull a common class together until all its images are one point; NT-Xent spreads it out."""

    options = SupervisedMinorityOptions

    def __init__(self, options: SupervisedMinorityOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.minority, _ = minority_and_majority(options, data)

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        kind = data.label
        smaller, larger = minority_and_majority(options, data)
        images = data.counts[kind][smaller]
        if images == data.counts[kind][larger]:
            a, b = (data.classes[kind][number] for number in sorted((smaller, larger)))
            raise UserError(
                f"{options.name} needs a rarer class, and {a!r} and {b!r} of data.labels=[{kind}] have {images} images "
                "each; set method.name to supervised_prototypes or supcon"
            )

    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        return supervised_minority(
            z_VND,
            batch.labels[self.data.label],
            minority=self.minority,
            temperature=self.opt.temperature,
            keys_VMD=keys_VMD,
            first=batch.first,
        )


def minority_and_majority(options: MethodOptions, data: TrainingSet) -> tuple[int, int]:
    """The ids of the rarer and of the commoner class; where both are as common, the first named counts as commoner.

    A vocabulary may name classes without images; they count for nothing.

    Raises:
        UserError: other than two classes have images.
    """
    kind = data.label
    counts = data.counts[kind]
    there = [number for number, count in enumerate(counts) if count]
    if len(there) != 2:
        named = ", ".join(data.classes[kind][number] for number in there[:_NAMED])
        more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
        raise UserError(
            f"{options.name} learns from two classes, and data.labels=[{kind}] has images of {len(there)}: "
            f"{named}{more}; set method.name to supcon, which learns from any number, or give another data.labels"
        )
    one, other = there
    return (one, other) if counts[one] < counts[other] else (other, one)
