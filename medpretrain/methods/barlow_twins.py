"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity matrix (Zbontar et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor

from medpretrain.losses.redundancy import barlow_twins
from medpretrain.methods.two_views import TwoViewOptions, TwoViews


class BarlowTwinsOptions(TwoViewOptions):
    """Defaults are the authors' for ResNet-50."""

    name: Literal["barlow_twins"] = "barlow_twins"
    off_diagonal_weight: Annotated[float, Ge(0)] = 0.0051
    """Of the correlations between different dimensions; the paper rounds it to 0.005."""


class BarlowTwins(TwoViews):
    options = BarlowTwinsOptions
    collapse_causes = "a lower optim.lr, a longer optim.warmup or a larger train.global_batch are the usual cures"
    opt: BarlowTwinsOptions

    def compare(self, z1_MD: Tensor, z2_MD: Tensor) -> Tensor:
        return barlow_twins(z1_MD, z2_MD, off_diagonal_weight=self.opt.off_diagonal_weight)
