"""SupCon: all views of a class attract each other (Khosla et al. 2020); the base of the methods that refine it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor, nn

from medpretrain.data.batches import Batch
from medpretrain.losses.gather import gather
from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import sup_con
from medpretrain.methods.base import Backbone, JointEmbedding, LabelKinds, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.models.heads import projection_mlp


class LabelledOptions(MethodOptions):
    """What the supervised contrastive methods share."""

    temperature: Annotated[float, Gt(0)] = 0.07
    projector: tuple[int, ...] = (2048, 128)
    """Widths of the MLP behind the backbone; none: the features themselves are contrasted."""
    instance_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of an NT-Xent term on the same embeddings, which keeps images of one class apart (a hybrid)."""
    instance_temperature: Annotated[float, Gt(0)] = 0.1


class Labelled(JointEmbedding):
    """A joint embedding trained by labels, with an instance-contrastive term where the recipe asks for one."""

    labels: ClassVar[LabelKinds] = "one"

    def __init__(self, options: LabelledOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.data = data
        self.backbone = backbone
        widths = options.projector
        self.projector = projection_mlp(backbone.num_features, widths) if widths else nn.Identity()

    @property
    def width(self) -> int:
        """D, of the embeddings."""
        return self.opt.projector[-1] if self.opt.projector else self.backbone.num_features

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        z, keys = outputs["z"].transpose(0, 1), gather(outputs["z"]).transpose(0, 1)
        loss = self.supervised(z, keys, batch)
        if self.opt.instance_weight:
            apart = nt_xent(z, temperature=self.opt.instance_temperature, keys_VMD=keys, first=batch.first)
            loss = loss + self.opt.instance_weight * apart
        return loss

    @abstractmethod
    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        """The labels' part: the mean over this rank's anchors, `keys_VMD` being the global batch."""


class SupConOptions(LabelledOptions):
    name: Literal["supcon"] = "supcon"


class SupCon(Labelled):
    options = SupConOptions

    def supervised(self, z_VND: Tensor, keys_VMD: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels[self.data.label]
        return sup_con(z_VND, labels, temperature=self.opt.temperature, keys_VMD=keys_VMD, first=batch.first)
