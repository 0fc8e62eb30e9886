"""SimCLR: two views of an image attract each other and repel all others (Chen et al. 2020)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.gather import gather
from medpretrain.losses.instance import nt_xent
from medpretrain.methods.base import Backbone, JointEmbedding, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.models.heads import projection_mlp


class SimClrOptions(MethodOptions):
    """Defaults are the paper's."""

    name: Literal["simclr"] = "simclr"
    temperature: Annotated[float, Gt(0)] = 0.1
    projector: tuple[int, ...] = (2048, 128)


class SimClr(JointEmbedding):
    options = SimClrOptions

    def __init__(self, options: SimClrOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.backbone = backbone
        self.projector = projection_mlp(backbone.num_features, options.projector)

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        keys = gather(outputs["z"]).transpose(0, 1)
        z = outputs["z"].transpose(0, 1)
        return nt_xent(z, temperature=self.opt.temperature, keys_VMD=keys, first=batch.first)
