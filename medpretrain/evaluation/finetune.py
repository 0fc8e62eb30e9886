"""Fine-tune a backbone with a new head on labelled images, as papers do, and score the test images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from data_prep.errors import UserError, nearest
from medpretrain.data.counter import hash64, purpose
from medpretrain.data.views import View
from medpretrain.evaluation.classifier import Training, epoch_order, first_linear, learning_rate, refuse_not_finite
from medpretrain.evaluation.features import Batches
from medpretrain.evaluation.labelled import Labelled
from medpretrain.evaluation.results import Value
from medpretrain.evaluation.training_images import IN_MEMORY_BYTES, TrainingImages
from medpretrain.models.preprocessing import Preprocessing
from medpretrain.training.optimizers import build_optimizer, layer_lr_scales

_SCORED_AT_ONCE = 256
_DROPOUT = purpose("dropout of a classifier")


class FinetuneSetting(Training):
    """How a backbone and its new head are trained: first the head alone where asked, then all of it.

    `lr`, `schedule`, `epochs` and what belongs to them are of the epochs in which all of it is trained.
    """

    head: Literal["linear", "relu_linear"] = "linear"
    """relu_linear: a ReLU before the linear layer."""
    frozen_epochs: Annotated[int, Ge(0)] = 0
    """Epochs of the head alone before that, at a constant `frozen_lr`, on features computed once without augmentation;
    the optimizer begins anew afterwards."""
    frozen_lr: Annotated[float, Gt(0)] = 1e-3
    layer_decay: Annotated[float, Gt(0), Le(1)] | None = None
    """Layer l of L has lr * layer_decay ** (L - l), the head, L, all of it (BEiT); layers as timm groups them."""
    augment: Literal["none", "flip_crop"] = "none"
    """flip_crop: a crop of 50 to 100 % of the area, mirrored half the time, a function of seed, epoch and image."""
    choose: Literal["last", "val"] = "last"
    """Which epoch is scored; val: the one of the lowest cross-entropy on the val images."""

    @model_validator(mode="after")
    def _fits(self) -> FinetuneSetting:
        if self.layer_decay is not None and self.optimizer != "adamw":
            raise ValueError("layer_decay goes with optimizer adamw")
        return self


MODAN = FinetuneSetting(name="modan", optimizer="adam", lr=1e-4, schedule="step", epochs=10, batch=32, weight_decay=0.0)
"""ModAn-MulSupCon, Table 3: StepLR(5, 0.1), all layers. Silent about weight decay (torch's Adam: 0), augmentation
(none) and the head (linear)."""
REPORT = FinetuneSetting(
    name="report",
    optimizer="adam",
    lr=1e-4,
    schedule="constant",
    epochs=30,
    batch=64,
    weight_decay=0.0,
    head="relu_linear",
    frozen_epochs=10,
    frozen_lr=1e-3,
)
"""The SimCLR and Barlow Twins report, 3.2.1: 10 epochs of the head alone, 30 of all. It does not say optimizer,
learning rates, batch, decay or augmentation. Those are ours: torch's Adam, 1e-3 for the head alone, 1e-4 for all."""
PLAIN = FinetuneSetting(
    name="plain", optimizer="adamw", lr=3e-4, schedule="cosine", warmup_epochs=5, epochs=50, batch=64, weight_decay=0.05
)
"""Ours: all layers at one learning rate, with a warm-up."""
LAYER_DECAY = PLAIN.model_copy(update={"name": "layer_decay", "lr": 1e-3, "layer_decay": 0.75})
"""As `plain`, with 0.75 a layer (0.65 to 0.75 in BEiT and MAE) below a higher rate."""
SETTINGS = {setting.name: setting for setting in (REPORT, MODAN, PLAIN, LAYER_DECAY)}


def finetune_setting(name: str) -> FinetuneSetting:
    """A setting by its name.

    Raises:
        UserError: there is none.
    """
    if name not in SETTINGS:
        raise UserError(f"there is no setting {name!r} of fine-tuning{nearest(name, SETTINGS)}")
    return SETTINGS[name]


@dataclass(frozen=True)
class FineTuned:
    """Class scores of the test images and how they came about."""

    scores_MK: NDArray[np.float64]
    """Each row sums to 1."""
    parameters: dict[str, Value]
    """The setting, field by field, and `train_loss` (mean cross-entropy of the last epoch's steps), `scored_epoch` (of
    the epochs of all layers, from 1), `val_loss` where val chose it."""


def finetune_scores(
    network: nn.Module,
    train: Labelled,
    test: Labelled,
    preprocessing: Preprocessing,
    setting: FinetuneSetting,
    *,
    seed: int,
    device: torch.device | str,
    val: Labelled | None = None,
    threads: int = 2,
    batches: Batches | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> FineTuned:
    """Train the network with a new head with cross-entropy; softmax scores (M, K) of the test images.

    All its parameters are trained, whatever was frozen in pretraining. While the head is trained alone the network is
    in eval mode, so its BatchNorm statistics stay; afterwards they follow the training images. A last batch of one
    image is left out of its epoch, for BatchNorm knows no deviation of one; the next epoch leaves out another. The test
    images choose nothing. First weights of the head, order and augmentation are functions of the seed; so is the whole
    on one CPU with a given number of threads.

    Args:
        network: maps (n, C, S, S) to (n, D); a copy of the caller's that may be changed.
        train: what is learned from.
        test: what is scored.
        preprocessing: what the network was pretrained with.
        setting: how.
        seed: names all that is drawn.
        device: where.
        val: what an epoch is chosen on, read only where the setting chooses on it.
        threads: of the CPU, for decoding.
        batches: reads the images; medpretrain's own pipeline if left out.
        in_memory_bytes: decoded training images up to this size are kept, more decoded each epoch; the scores are the
            same.

    Raises:
        UserError: no training image; a setting that needs val without any, or the order of layers that timm does not
            know.
        WorkFailed: the loss left the finite numbers; an image does not decode.
    """
    if not len(train):
        raise UserError("fine-tuning needs at least one training image")
    if setting.choose == "val" and (val is None or not len(val)):
        raise UserError(f"fine-tuning {setting.name!r} chooses its epoch on val images, and there are none")
    if setting.layer_decay is not None and not hasattr(network, "group_matcher"):
        raise UserError(
            f"fine-tuning {setting.name!r} needs the order of the layers, which timm does not have for "
            f"{type(network).__name__}; {PLAIN.name!r} does not"
        )
    n_classes = len(train.classes)
    assert test.classes == train.classes
    device = torch.device(device)

    def images_of(part: Labelled, limit: int) -> TrainingImages:
        return TrainingImages(part, preprocessing, device, threads, batches, limit)

    with _seeded(seed, device), torch.inference_mode(False), torch.enable_grad():
        images = images_of(train, in_memory_bytes)
        network.to(device).eval().requires_grad_(True)
        one = next(iter(images.in_order(np.zeros(1, np.int64), 1)))
        with torch.no_grad():
            width = network(one).shape[1]
        head = first_linear(width, n_classes, seed)
        before = [nn.ReLU()] if setting.head == "relu_linear" else []
        model = nn.Sequential(network, nn.Sequential(*before, head)).to(device)
        tuner = _Tuner(model, images, setting, seed)
        loss = tuner.train_head() if setting.frozen_epochs else float("nan")
        held_out = images_of(val, in_memory_bytes) if val is not None and setting.choose == "val" else None
        best, scored, kept = float("inf"), setting.epochs, None
        for epoch, mean in enumerate(tuner.train_all()):
            loss = mean
            if held_out is not None:
                found = _cross_entropy(model, held_out)
                if found < best:
                    best, scored = found, epoch + 1
                    kept = {name: value.clone() for name, value in model.state_dict().items()}
        if kept is not None:
            model.load_state_dict(kept)
        scores_MK = _logits(model, images_of(test, 0)).softmax(dim=1).cpu().numpy()
    used: dict[str, Value] = dict(setting.model_dump(exclude={"name"}))
    used |= {"train_loss": loss, "scored_epoch": scored}
    return FineTuned(scores_MK, used if held_out is None else used | {"val_loss": best})


class _Tuner:
    """The two phases of training."""

    def __init__(self, model: nn.Sequential, images: TrainingImages, setting: FinetuneSetting, seed: int) -> None:
        self._model, self._images, self._setting, self._seed = model, images, setting, seed
        self._labels = torch.from_numpy(images.part.labels_N.astype(np.int64)).to(images.device)
        size = images.preprocessing.size
        self._view = View(size=size, crop=(0.5, 1.0), flip=0.5) if setting.augment == "flip_crop" else None

    def train_head(self) -> float:
        """The head alone; the mean loss of the last epoch."""
        setting, head = self._setting, self._model[1]
        count = len(self._images.part)
        self._model.eval()
        with torch.no_grad():
            in_order = self._images.in_order(np.arange(count), _SCORED_AT_ONCE)
            features = torch.cat([self._model[0](images) for images in in_order])
        optimizer = _optimizer(setting, head, setting.frozen_lr, None)
        mean = float("nan")
        for epoch in range(setting.frozen_epochs):
            order = epoch_order(count, self._seed, epoch).to(features.device)
            total = torch.zeros((), device=features.device)
            for places in order.split(setting.batch):
                total += _step(head, features[places], self._labels[places], optimizer)
            mean = float(total) / count
            refuse_not_finite(mean, f"fine-tuning {setting.name!r}, its head alone,", epoch, setting.frozen_lr)
        return mean

    def train_all(self) -> Iterator[float]:
        """All layers; the mean loss after each epoch."""
        setting, count = self._setting, len(self._images.part)
        optimizer = _optimizer(setting, self._model, setting.lr, setting.layer_decay)
        left_out = count % setting.batch == 1 and 1 < setting.batch < count
        seen = count - left_out
        steps = -(-seen // setting.batch)
        for epoch in range(setting.epochs):
            self._model.train()
            order = epoch_order(count, self._seed, setting.frozen_epochs + epoch).numpy()[:seen]
            total = torch.zeros((), device=self._labels.device)
            for step, images in enumerate(self._epoch(order, epoch)):
                places = torch.from_numpy(order[step * setting.batch :][: len(images)]).to(self._labels.device)
                rate = learning_rate(setting, epoch, epoch * steps + step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                total += _step(self._model, images, self._labels[places], optimizer)
            mean = float(total) / seen
            refuse_not_finite(mean, f"fine-tuning {setting.name!r}", epoch, setting.lr)
            yield mean

    def _epoch(self, order: NDArray[np.int64], epoch: int) -> Iterator[Tensor]:
        if self._view is None:
            return self._images.in_order(order, self._setting.batch)
        return self._images.augmented(order, self._setting.batch, self._view, seed=self._seed, epoch=epoch)


def _step(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of the optimizer; the sum of the losses of its images."""
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach() * len(y)


def _optimizer(
    setting: FinetuneSetting, model: nn.Module, lr: float, layer_decay: float | None
) -> torch.optim.Optimizer:
    """AdamW decays weights but no biases and norms, as everywhere in medpretrain; Adam is torch's own."""
    if setting.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=setting.weight_decay, fused=True)
    scales = None
    if layer_decay is not None:
        assert isinstance(model, nn.Sequential)
        scales = layer_lr_scales(model[0], layer_decay)
    return build_optimizer(
        model.named_parameters(),
        name="adamw",
        lr=lr,
        momentum=0.0,
        weight_decay=setting.weight_decay,
        betas=(0.9, 0.999),
        lr_scales=scales,
    )


@torch.no_grad()
def _logits(model: nn.Module, images: TrainingImages) -> Tensor:
    """(M, K) float64, in eval mode."""
    model.eval()
    in_order = images.in_order(np.arange(len(images.part)), _SCORED_AT_ONCE)
    return torch.cat([model(some).double() for some in in_order])


def _cross_entropy(model: nn.Module, images: TrainingImages) -> float:
    labels = torch.from_numpy(images.part.labels_N.astype(np.int64)).to(images.device)
    return float(functional.cross_entropy(_logits(model, images), labels))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators, which dropout draws from, named by the seed inside and as they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(hash64(seed, _DROPOUT) >> np.uint64(1)))
        yield
