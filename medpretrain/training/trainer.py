"""One optimizer step: forward, loss of the global batch, backward, clip, update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medpretrain.data.batches import Batch
from medpretrain.data.counter import hash64, purpose
from medpretrain.losses.gather import mean_over_ranks
from medpretrain.methods.base import Method, Outputs, Progress
from medpretrain.recipe import Recipe
from medpretrain.training.optimizers import build_optimizer, clip_per_parameter_, layer_lr_scales
from medpretrain.training.process import Process
from medpretrain.training.schedules import cosine, warmup_cosine
from medpretrain.training.strategy import DistributedData

_LAYERS = purpose("layers")


@dataclass(frozen=True)
class Measured:
    """What a step came to on this rank; tensors that nobody has waited for yet."""

    loss: Tensor
    lr: float
    grad_norm: Tensor
    features: Tensor
    """(n, V, D), of the backbone, of this rank's images."""


class Trainer:
    """A method, its optimizer and its schedules.

    Args:
        total: steps of the whole run.
        steps_per_epoch: may be a fraction.
    """

    def __init__(self, method: Method, recipe: Recipe, process: Process, *, total: int, steps_per_epoch: float) -> None:
        self.method, self._process, self._optim = method, process, recipe.optim
        self._seed, self._total, self._steps_per_epoch = recipe.seed, total, steps_per_epoch
        self._lr = recipe.optim.scaled(recipe.train.global_batch)
        method.train()
        self._strategy = DistributedData(method, process, precision=recipe.train.precision)
        trained = [(name, value) for name, value in method.named_parameters() if value.requires_grad]
        self._parameters = [value for _, value in trained]
        optim = recipe.optim
        self.optimizer = build_optimizer(
            trained,
            name=optim.name,
            lr=self._lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            plain_lr=optim.plain_lr and optim.plain_lr * self._lr / optim.lr,
            lr_scales=layer_lr_scales(method.trained, optim.layer_decay) if optim.layer_decay else None,
        )

    def progress(self, step: int) -> Progress:
        return Progress(step, self._total, step / self._steps_per_epoch)

    def step(self, batch: Batch) -> Measured:
        """Train on one batch."""
        progress = self.progress(batch.step)
        lr = self._schedule(progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss, outputs = self.backward(batch, progress)
        self.method.before_update(progress)
        norm = self._clip()
        self.optimizer.step()
        self.method.after_update(outputs, batch, progress)
        return Measured(loss, lr, norm, outputs["features"])

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes over time; random numbers are functions of the step and need no state."""
        return {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _schedule(self, progress: Progress) -> float:
        optim = self._optim
        lr = warmup_cosine(
            progress.step,
            total=self._total,
            warmup=round(optim.warmup * self._total),
            base=self._lr,
            final=optim.final_lr,
            start=optim.warmup_lr,
        )
        decay = optim.weight_decay
        if optim.final_weight_decay is not None:
            decay = cosine(progress.step, total=self._total, start=decay, end=optim.final_weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["decay"]:
                group["weight_decay"] = decay
        return lr

    def backward(self, batch: Batch, progress: Progress) -> tuple[Tensor, Outputs]:
        """Gradients of the loss of the global batch.

        With several micro-batches the loss still couples all their embeddings: they are computed without gradient
        first, the loss's gradient to each embedding is kept, and a second pass takes it to the parameters (gradient
        caching, Gao et al. 2021). Only BatchNorm's statistics are a micro-batch's. Parameters that the loss itself uses
        have their gradient from the loss, and hand it in with the last pass.
        """
        if len(batch.micro) == 1:
            self._seed_layers(batch, 0)
            outputs = self._strategy.forward(batch.micro[0])
            loss = self.method.loss(outputs, batch, progress)
            loss.backward()
            return loss.detach(), {name: value.detach() for name, value in outputs.items()}
        parts: list[Outputs] = []
        with torch.no_grad(), statistics_kept(self.method):
            for turn, views in enumerate(batch.micro):
                self._seed_layers(batch, turn)
                parts.append(self._strategy.forward(views))
        outputs = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
        loss = self.method.loss(outputs, batch, progress)
        loss.backward()
        # A strategy averages over processes what reaches a parameter in the last pass, so it must all come then.
        of_loss = [(value, value.grad) for value in self._parameters if value.grad is not None]
        for value, _ in of_loss:
            value.grad = None
        for turn, views in enumerate(batch.micro):
            last = turn == len(batch.micro) - 1
            with nullcontext() if last else self._strategy.unsynchronised():
                self._seed_layers(batch, turn)
                again = self._strategy.forward(views)
                first = sum(len(part["features"]) for part in parts[:turn])
                reached = [(value, _rows(outputs[name].grad, first, len(value))) for name, value in again.items()]
                live = [(value, grad) for value, grad in reached if value.requires_grad and grad is not None]
                live += of_loss if last else []
                torch.autograd.backward([value for value, _ in live], [grad for _, grad in live])
        return loss.detach(), {name: value.detach() for name, value in outputs.items()}

    def _seed_layers(self, batch: Batch, turn: int) -> None:
        """Layers that draw (drop path) draw from a seed of their own in every pass, alike in a repeated one."""
        torch.manual_seed(int(hash64(self._seed, _LAYERS, batch.step, batch.first, turn) >> 1))

    def _clip(self) -> Tensor:
        if self._optim.clip is not None and self._optim.clip_each:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            clip_per_parameter_(self._parameters, self._optim.clip)
            return norm
        return torch.nn.utils.clip_grad_norm_(self._parameters, self._optim.clip or float("inf"))


def mean_loss(loss: Tensor) -> float:
    """The loss of the global batch from each rank's part; a collective."""
    return mean_over_ranks(loss.detach()).item()


def _rows(grad: Tensor | None, first: int, count: int) -> Tensor | None:
    return None if grad is None else grad[first : first + count]


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm uses a batch's statistics but does not record them: a pass that will be repeated counts once."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    recorded = [layer.track_running_stats for layer in norms]
    for layer in norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, was in zip(norms, recorded, strict=True):
            layer.track_running_stats = was
