"""One optimizer step: forward, loss of the global batch, backward, clip, update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medpretrain.checkpoints.parts import Part
from medpretrain.data.batches import Batch
from medpretrain.data.counter import hash64, purpose
from medpretrain.losses.gather import mean_over_ranks
from medpretrain.methods.base import Method, Outputs, Progress
from medpretrain.models.batchnorm import Statistics, statistics_kept
from medpretrain.models.drop_path import DropPaths
from medpretrain.recipe import Recipe
from medpretrain.training.optimizers import WholeNorms, build_optimizer, clip_, l2_norms, layer_lr_scales
from medpretrain.training.process import Process
from medpretrain.training.schedules import cosine, warmup_cosine
from medpretrain.training.strategies import spread

_LAYERS = purpose("layers")


@dataclass(frozen=True)
class Measured:
    """What a step came to on this rank; tensors that nobody has waited for yet."""

    loss: Tensor
    lr: float
    grad_norm: Tensor
    features: Tensor
    """(n, V, D), of the backbone, of this rank's images."""
    finite: bool
    """Whether the gradient was finite on all ranks; else nothing was updated."""


class Trainer:
    """A method, its optimizer and its schedules.

    Args:
        total: steps of the whole run.
        steps_per_epoch: may be a fraction.

    Raises:
        UserError: the strategy cannot train what the recipe says.
    """

    def __init__(self, method: Method, recipe: Recipe, process: Process, *, total: int, steps_per_epoch: float) -> None:
        self.method, self._process, self._optim = method, process, recipe.optim
        self._seed, self._total, self._steps_per_epoch = recipe.seed, total, steps_per_epoch
        self._lr = recipe.optim.scaled(recipe.train.global_batch)
        self._own_statistics = process.world > 1 and not recipe.train.sync_batchnorm
        method.train()
        self._drop_paths = DropPaths(method.trained)
        self.strategy = spread(method, recipe, process, self._make_optimizer)
        self._freezable = [name in method.freezable for name in self.strategy.names]
        self._statistics = Statistics(method)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.strategy.optimizer

    def progress(self, step: int) -> Progress:
        return Progress(step, self._total, step / self._steps_per_epoch)

    def step(self, batch: Batch) -> Measured:
        """Train on one batch; where the gradient is not finite on any rank, all stays as it was."""
        progress = self.progress(batch.step)
        lr = self._schedule(progress)
        self._statistics.keep()
        loss, outputs = self.backward(batch, progress)
        norm = self._clip(progress)
        # The one place where a step waits for the device: what is not finite must not reach the weights.
        finite = math.isfinite(norm.item())
        if finite:
            self.strategy.step()
            self.method.after_update(outputs, batch, progress)
        else:
            self.strategy.drop_gradients()
            self._statistics.take_back()
        return Measured(loss, lr, norm, outputs["features"], finite)

    def parts(self) -> list[Part]:
        """Everything that changes over time; random numbers are functions of the step and need no state. A collective.

        Checkpoints are written from these tensors and read into them; then `loaded` is called.
        """
        if self._own_statistics:  # those of one rank, not a mixture
            for layer in self.method.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    for buffer in layer.buffers(recurse=False):
                        dist.broadcast(buffer, src=0)
        return list(self.strategy.parts())

    def loaded(self) -> None:
        """Called when a checkpoint has been read into `parts`."""
        self.strategy.loaded()

    def _make_optimizer(self, trained: Mapping[str, nn.Parameter], whole_norms: WholeNorms) -> torch.optim.Optimizer:
        optim = self._optim
        scales = layer_lr_scales(self.method.trained, optim.layer_decay) if optim.layer_decay else {}
        by_name = {name: scales[value] for name, value in self.method.named_parameters() if value in scales}
        return build_optimizer(
            trained.items(),
            name=optim.name,
            lr=self._lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            plain_lr=optim.plain_lr and optim.plain_lr * self._lr / optim.lr,
            lr_scales={value: by_name[name] for name, value in trained.items() if name in by_name},
            freezable=self.method.freezable,
            whole_norms=whole_norms,
        )

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
        frozen = self.method.frozen(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["frozen"] = frozen and group["freezable"]
            if group["decay"]:
                group["weight_decay"] = decay
        return lr

    def backward(self, batch: Batch, progress: Progress) -> tuple[Tensor, Outputs]:
        """Gradients of the loss of the global batch.

        With several micro-batches the loss still couples all their embeddings: they are computed without gradient
        first, the loss's gradient to each embedding is kept, and a second pass takes it to the parameters (gradient
        caching, Gao et al. 2021). Only BatchNorm's statistics are a micro-batch's. Parameters that the loss itself
        reads have their gradient from the loss, and hand it in with the last pass.
        """
        if len(batch.micro) == 1:
            self._seed_layers(batch, 0)
            outputs = self.strategy.forward(batch.micro[0])
            loss = self.method.loss(outputs, batch, progress)
            self.strategy.backward([loss], [_sign(loss)], last=True)
            return loss.detach(), {name: value.detach() for name, value in outputs.items()}
        parts: list[Outputs] = []
        with torch.no_grad(), statistics_kept(self.method):
            for turn, views in enumerate(batch.micro):
                self._seed_layers(batch, turn)
                parts.append(self.strategy.forward(views))
        outputs = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
        loss = self.method.loss(outputs, batch, progress)
        read = [value for name in self.method.read_by_loss for value in self.method.get_submodule(name).parameters()]
        reached = torch.autograd.grad(loss, [*outputs.values(), *read], _sign(loss), allow_unused=True)
        of_output = dict(zip(outputs, reached, strict=False))
        # A strategy averages over processes what reaches a parameter in the last pass, so it must all come then.
        of_read = [(value, grad) for value, grad in zip(read, reached[len(outputs) :], strict=True) if grad is not None]
        for turn, views in enumerate(batch.micro):
            last = turn == len(batch.micro) - 1
            with nullcontext() if last else self.strategy.unsynchronised():
                self._seed_layers(batch, turn)
                again = self.strategy.forward(views)
                first = sum(len(part["features"]) for part in parts[:turn])
                live: list[tuple[Tensor, Tensor]] = [*of_read] if last else []
                for name, value in again.items():
                    grad = of_output[name]
                    if value.requires_grad and grad is not None:
                        live.append((value, grad[first : first + len(value)]))
                self.strategy.backward([value for value, _ in live], [grad for _, grad in live], last=last)
        return loss.detach(), {name: value.detach() for name, value in outputs.items()}

    def _seed_layers(self, batch: Batch, turn: int) -> None:
        """Layers that draw, draw alike in a repeated pass; paths are dropped alike on any number of processes."""
        images = batch.size // self._process.world // len(batch.micro)
        self._drop_paths.begin(self._seed, batch.step, batch.first + turn * images, images)
        seed = int(hash64(self._seed, _LAYERS, batch.step, batch.first, turn) >> 1)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 0.5 ms where CUDA is not in use
        if self._process.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _clip(self, progress: Progress) -> Tensor:
        """The norm of all gradients before they are clipped."""
        frozen = self.method.frozen(progress)
        gradients = [
            None if frozen and freezable else gradient
            for gradient, freezable in zip(self.strategy.gradients(), self._freezable, strict=True)
        ]
        norms = self.strategy.whole_norms(l2_norms(gradients), self.strategy.trained)
        if self._optim.clip is not None:
            clip_(gradients, norms, self._optim.clip, each=self._optim.clip_each)
        return norms.norm()


def mean_loss(loss: Tensor) -> float:
    """The loss of the global batch from each rank's part; a collective."""
    return mean_over_ranks(loss.detach()).item()


def _sign(loss: Tensor) -> Tensor:
    """What the backward pass starts from: 1, or NaN where the loss is not finite, so that every rank learns of it."""
    return torch.where(torch.isfinite(loss), 1.0, torch.nan).to(loss.dtype)
