"""What every method is: networks, and the three things the training loop asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from medpretrain.data.batches import Batch, Views

Outputs = dict[str, Tensor]


class Backbone(nn.Module):
    """What a method needs of a backbone: (n, C, S, S) -> (n, num_features)."""

    num_features: int


class MethodOptions(BaseModel):
    """What a recipe may say under `method`; each method adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str


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
    `before_update` when gradients are there, `after_update` when the optimizer has stepped.
    """

    options: ClassVar[type[MethodOptions]]
    view_names: ClassVar[tuple[str, ...]]
    needs_labels: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, options: MethodOptions, backbone: Backbone, label_sizes: Mapping[str, int]) -> None:
        """Args:
        backbone: maps (n, C, S, S) to features (n, D), with `num_features` = D; its weights are the starting point.
        label_sizes: how many classes each label kind of the batches has.
        """
        super().__init__()

    @abstractmethod
    def forward(self, views: Views) -> Outputs:
        """Embeddings of n images, each tensor with n as its first dimension; `features` (n, D) must be among them."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        """The mean loss of this rank's images; its mean over equal ranks is the loss of the global batch."""

    def before_update(self, progress: Progress) -> None:
        """Change gradients before they are clipped and applied."""

    def after_update(self, outputs: Outputs, progress: Progress) -> None:
        """Update what no gradient updates: teacher, centre, queue."""

    @property
    @abstractmethod
    def exported(self) -> nn.Module:
        """The backbone that is evaluated and exported."""
