"""VICReg: invariance of two views with variance and covariance kept in bounds (Bardes et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor

from medpretrain.losses.redundancy import vicreg
from medpretrain.methods.two_views import TwoViewOptions, TwoViews

Weight = Annotated[float, Ge(0)]


class VicRegOptions(TwoViewOptions):
    """Defaults are the paper's."""

    name: Literal["vicreg"] = "vicreg"
    invariance: Weight = 25.0
    variance: Weight = 25.0
    """Without this term all embeddings become the same."""
    covariance: Weight = 1.0


class VicReg(TwoViews):
    options = VicRegOptions
    collapse_causes = "a higher method.variance, a lower optim.lr or a longer optim.warmup are the usual cures"
    opt: VicRegOptions

    def compare(self, z1_MD: Tensor, z2_MD: Tensor) -> Tensor:
        return vicreg(
            z1_MD,
            z2_MD,
            invariance=self.opt.invariance,
            variance=self.opt.variance,
            covariance=self.opt.covariance,
        )
