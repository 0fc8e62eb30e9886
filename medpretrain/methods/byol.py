"""BYOL: each view predicts what a slowly following encoder makes of the other one (Grill et al. 2020)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.redundancy import byol
from medpretrain.methods.base import Backbone, Outputs, Progress, TrainingSet
from medpretrain.methods.momentum import Fraction, MomentumEncoder, MomentumOptions
from medpretrain.methods.two_views import Widths
from medpretrain.models.heads import projection_mlp


class ByolOptions(MomentumOptions):
    """Defaults are the authors' for runs of 100 to 300 epochs; for 1000 epochs `momentum` is 0.996."""

    name: Literal["byol"] = "byol"
    momentum: Fraction = 0.99
    final_momentum: Fraction | None = 1.0
    projector: Widths = (4096, 256)
    predictor: Widths = (4096, 256)
    """Behind the projector of the trained encoder alone."""

    @model_validator(mode="after")
    def _one_space(self) -> ByolOptions:
        if self.projector[-1] != self.predictor[-1]:
            raise ValueError(
                f"predictor and projector must end in the same width, not {self.predictor[-1]} and {self.projector[-1]}"
            )
        return self


class Byol(MomentumEncoder):
    options = ByolOptions
    exact_views: ClassVar[bool] = True
    collapse_causes = "a method.momentum nearer to 1, a lower optim.lr or a longer optim.warmup are the usual cures"
    opt: ByolOptions

    def __init__(self, options: ByolOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self._build(
            backbone,
            projection_mlp(backbone.num_features, options.projector),
            projection_mlp(options.projector[-1], options.predictor),
        )

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        return byol(outputs["query"].transpose(0, 1), outputs["key"].transpose(0, 1))
