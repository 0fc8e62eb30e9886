"""ModAn-MulSupCon: multi-label supervised contrastive learning on modality and anatomy."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.supervised import mul_sup_con, multi_hot
from medpretrain.methods.base import LabelKinds
from medpretrain.methods.supcon import Labelled, LabelledOptions


class MulSupConOptions(LabelledOptions):
    """Defaults are the paper's (table 2)."""

    name: Literal["modan_mulsupcon"] = "modan_mulsupcon"
    threshold: Annotated[float, Gt(0), Le(1)] = 0.3
    """Jaccard similarity from which a pair is positive; with one modality and one anatomy it is 0, 1/3 or 1."""
    projector: tuple[int, ...] = ()
    """None in the paper."""


class ModAnMulSupCon(Labelled):
    options = MulSupConOptions
    labels: ClassVar[LabelKinds] = "some"
    opt: MulSupConOptions

    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        sizes = self.data.label_sizes
        return mul_sup_con(
            z_VND,
            multi_hot([batch.labels[kind] for kind in sizes], list(sizes.values())),
            temperature=self.opt.temperature,
            threshold=self.opt.threshold,
            keys_VMD=keys_VMD,
            first=batch.first,
        )
