"""What the methods that compare exactly two views of each image share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

from annotated_types import Ge, MinLen
from torch import Tensor

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.gather import gather
from medpretrain.methods.base import Backbone, JointEmbedding, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.models.heads import projection_mlp

Widths = Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)]
"""Of the layers of an MLP, the output last."""


class TwoViewOptions(MethodOptions):
    projector: Widths = (8192, 8192, 8192)


class TwoViews(JointEmbedding):
    """A joint embedding whose loss is of two views of the whole global batch at once.

    Statistics over images do not split into a rank's share, so every rank computes the whole loss from all embeddings.
    Each view has a pass of its own, as in the papers, so BatchNorm sees one view at a time.
    """

    exact_views: ClassVar[bool] = True
    one_pass: ClassVar[bool] = False

    def __init__(self, options: TwoViewOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.backbone = backbone
        self.projector = projection_mlp(backbone.num_features, options.projector)

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        if global_batch < 2:
            raise UserError(f"{options.name} takes statistics over the global batch: set train.global_batch above 1")

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        return self.compare(*gather(outputs["z"]).unbind(dim=1))

    @abstractmethod
    def compare(self, z1_MD: Tensor, z2_MD: Tensor) -> Tensor:
        """The loss of the global batch's embeddings."""
