"""What every method is: networks, and the few things the training loop asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch, Views

Outputs = dict[str, Tensor]
LabelKinds = Literal["none", "one", "some"]


class Backbone(nn.Module):
    """What a method needs of a backbone: (n, C, S, S) -> (n, num_features)."""

    num_features: int


class MethodOptions(BaseModel):
    """What a recipe may say under `method`; each method adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str


@dataclass(frozen=True)
class TrainingSet:
    """What a method may know of the images it learns from, before it sees one.

    Attributes:
        samples: images of the split.
        classes: for each label kind the names of its classes; a label id is a place among them.
        counts: for each label kind the images of each class; images without the label are in none.
        seed: the run's.
    """

    samples: int
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seed: int = 0

    @property
    def label_sizes(self) -> dict[str, int]:
        """How many classes each label kind has."""
        return {kind: len(names) for kind, names in self.classes.items()}

    @property
    def label(self) -> str:
        """The only label kind."""
        (kind,) = self.classes
        return kind


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` of `total` steps, counted from 0, and the fractional `epoch`."""

    step: int
    total: int
    epoch: float

    @property
    def fraction(self) -> float:
        """0 at the first step, 1 at the last."""
        return self.step / max(1, self.total - 1)


class Method(nn.Module, ABC):
    """Networks and the rules for training them; everything that changes over time is in the state dict.

    The loop calls, in each step: `forward` on each micro-batch of views, `loss` on the outputs of all of them,
    `after_update` when the optimizer has stepped. Before a step for which `wants_survey` is true it shows the method an
    embedding of every training image.
    """

    options: ClassVar[type[MethodOptions]]
    view_kinds: ClassVar[Mapping[str, int]]
    """The kinds of views it takes and how many of each there must be; the first kind is what is seen at evaluation."""
    exact_views: ClassVar[bool] = False
    """Whether it has no use for more views of a kind than that."""
    labels: ClassVar[LabelKinds] = "none"
    """How many label kinds it learns from: none, exactly one, or at least one."""
    freezable: ClassVar[Sequence[str]] = ()
    """Names of parameters that are not trained at times."""
    read_by_loss: ClassVar[Sequence[str]] = ()
    """Names of modules whose parameters `loss` reads; a strategy that takes networks apart leaves these whole."""
    collapse_causes: ClassVar[str] = "a lower optim.lr or a longer optim.warmup are the usual cures"
    """What the collapse alarm adds: the likely cure."""

    @abstractmethod
    def __init__(self, options: MethodOptions, backbone: Backbone, data: TrainingSet) -> None:
        """Args:
        backbone: maps (n, C, S, S) to features (n, D), with `num_features` = D; its weights are the starting point.
        data: the images and labels it will see.
        """
        super().__init__()

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        """Refuse what cannot be trained, before any network is built.

        Raises:
            UserError: the data or the batch do not fit the method; says what to change.
        """
        if cls.labels == "none":
            return
        for kind, counts in data.counts.items():
            if not any(counts):
                raise UserError(f"no image of the training split has a known label {kind!r}; give another data.labels")
        if cls.labels == "one" and len(data.classes) > 1:
            raise UserError(
                f"{options.name} learns from one label kind and data.labels names {len(data.classes)}: "
                f"{', '.join(data.classes)}; modan_mulsupcon learns from several"
            )

    @abstractmethod
    def forward(self, views: Views) -> Outputs:
        """Embeddings of n images, each tensor with n as its first dimension.

        Among them `features` (n, V, D) without gradient: the backbone's, of as many views as are at hand, for the
        measures of collapse.
        """

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        """The mean loss of this rank's images; its mean over equal ranks is the loss of the global batch."""

    def frozen(self, progress: Progress) -> bool:
        """Whether `freezable` parameters stay as they are in this step."""
        return False

    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        """Update what no gradient updates: teacher, centre, queue."""

    def wants_survey(self, progress: Progress) -> bool:
        """Whether `survey` is to be called before this step."""
        return False

    def embed(self, images: Tensor) -> Tensor:
        """What a survey keeps of n images (n, C, S, S): (n, D)."""
        features: Tensor = self.trained(images)
        return features

    def survey(self, embeddings_ND: Tensor, labels: Mapping[str, Tensor]) -> None:
        """Learn from all training images at once.

        Args:
            embeddings_ND: of each image without augmentation, in the order of `Batch.samples`; the same on every rank.
            labels: for each label kind the ids, (N,) int64, -1 where unknown.
        """

    @property
    @abstractmethod
    def exported(self) -> nn.Module:
        """The backbone that is evaluated and exported."""

    @property
    def trained(self) -> nn.Module:
        """The backbone that the optimizer trains."""
        return self.exported


class JointEmbedding(Method):
    """A backbone and a projector that see all views alike, as in SimCLR; what remains is a loss of the embeddings."""

    view_kinds: ClassVar[Mapping[str, int]] = {"crop": 2}
    one_pass: ClassVar[bool] = True
    """Whether all views go through the networks together, so that BatchNorm sees them as one batch."""
    backbone: Backbone
    projector: nn.Module

    def forward(self, views: Views) -> Outputs:
        """`z` (n, V, D) with gradient, and `features`."""
        crops = views["crop"]
        passes = [torch.cat(crops)] if self.one_pass else crops
        features = [self.backbone(images) for images in passes]
        z = [self.projector(one) for one in features]
        return {
            "z": image_first(torch.cat(z), len(crops)),
            "features": image_first(torch.cat(features), len(crops)).detach(),
        }

    def embed(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.projector(self.backbone(images))
        return embedding

    @property
    def exported(self) -> nn.Module:
        return self.backbone


def image_first(x: Tensor, views: int) -> Tensor:
    """Views one after another, (V * n, ...), as (n, V, ...)."""
    return x.unflatten(0, (views, -1)).transpose(0, 1)
