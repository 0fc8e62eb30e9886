"""How a classifier is trained on few images: order, first weights and learning rate as functions of the seed."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from data_prep.errors import WorkFailed
from medpretrain.data.counter import hash64, purpose, uniform
from medpretrain.data.order import permute
from medpretrain.training.schedules import warmup_cosine

_ORDER = purpose("batches of a classifier")
_INIT = purpose("weights of a classifier")


class Training(BaseModel):
    """How a classifier is trained with cross-entropy, its last batch short."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    optimizer: Literal["adam", "adamw"]
    lr: Annotated[float, Gt(0)]
    schedule: Literal["constant", "cosine", "step"]
    """cosine: to 0 at the last step, a value a step. step: times `gamma` every `step_epochs` epochs (StepLR)."""
    epochs: Annotated[int, Ge(1)]
    batch: Annotated[int, Ge(1)]
    weight_decay: Annotated[float, Ge(0)]
    warmup_epochs: Annotated[int, Ge(0)] = 0
    """Of the cosine: a straight line from 0, a value a step."""
    step_epochs: Annotated[int, Ge(1)] = 5
    gamma: Annotated[float, Gt(0)] = 0.1


def learning_rate(setting: Training, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Of one step, counted from 0 through all epochs; the first step of a warm-up is not 0.

    >>> stepped = Training(name="x", optimizer="adam", lr=1.0, schedule="step", epochs=10, batch=32, weight_decay=0)
    >>> [learning_rate(stepped, epoch, epoch, 1) for epoch in (0, 4, 5, 9)]
    [1.0, 1.0, 0.1, 0.1]
    """
    if setting.schedule == "cosine":
        warmup = min(setting.warmup_epochs, setting.epochs - 1) * steps_per_epoch
        at = step + 1 if step < warmup else step
        return warmup_cosine(at, total=setting.epochs * steps_per_epoch, warmup=warmup, base=setting.lr, final=0.0)
    if setting.schedule == "step":
        return setting.lr * setting.gamma ** (epoch // setting.step_epochs)
    return setting.lr


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` training images in an epoch: (count,) int64, the same on any device and any threads.

    >>> sorted(epoch_order(5, seed=1, epoch=0).tolist()), epoch_order(5, 1, 0).equal(epoch_order(5, 1, 1))
    ([0, 1, 2, 3, 4], False)
    """
    return torch.from_numpy(permute(np.arange(count), count, hash64(seed, _ORDER, epoch)))


def first_linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """torch's own distribution of first weights, uniform in +-1 / sqrt(inputs), as a function of the seed alone."""
    bound = inputs**-0.5
    drawn = uniform(seed, _INIT, np.arange(outputs * (inputs + 1)), low=-bound, high=bound).astype(np.float32)
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(drawn[: outputs * inputs]).view(outputs, inputs))
        layer.bias.copy_(torch.from_numpy(drawn[outputs * inputs :]))
    return layer


def refuse_not_finite(loss: float, what: str, epoch: int, lr: float) -> None:
    """Raises:
    WorkFailed: the loss is not finite.
    """
    if not np.isfinite(loss):
        raise WorkFailed(
            f"the loss of {what} is not finite in epoch {epoch + 1} at a learning rate of {lr:g}; "
            "take a smaller one, or look for values in images or features that are out of scale"
        )
