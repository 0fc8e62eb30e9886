"""DDP: a full copy of the networks on every process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medpretrain.checkpoints.parts import Part
from medpretrain.methods.base import Method
from medpretrain.recipe import Recipe
from medpretrain.training.process import Process
from medpretrain.training.strategies.base import MakeOptimizer, Strategy, copied, state_of

_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters  # torch 2.15


class Ddp(Strategy):
    """A copy of the method on every process; gradients are averaged over processes during the backward pass."""

    def __init__(self, method: Method, recipe: Recipe, process: Process, make_optimizer: MakeOptimizer) -> None:
        super().__init__(method, recipe, process)
        if recipe.train.channels_last:
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = dict(method.named_parameters())
        self.trained = [parameters[name] for name in self.names]
        self._whole: nn.Module = method
        if process.world > 1:
            # Buffers stay each process's own: those that matter are the same everywhere by construction.
            keep_buffers = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
            devices = [process.device] if process.device.type == "cuda" else None
            self._whole = DistributedDataParallel(method, device_ids=devices, **keep_buffers)  # type: ignore[arg-type]
        self.optimizer = make_optimizer(dict(zip(self.names, self.trained, strict=True)), self.whole_norms)

    @property
    def _wrapped(self) -> nn.Module:
        return self._whole

    def unsynchronised(self) -> AbstractContextManager[None]:
        if isinstance(self._whole, DistributedDataParallel):
            return self._whole.no_sync()
        return nullcontext()

    def backward(self, values: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        torch.autograd.backward(values, gradients)

    def gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.trained]

    def step(self) -> None:
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def parts(self) -> Iterator[Part]:
        yield from copied(self.method.state_dict(), "method.")
        for name, parameter in zip(self.names, self.trained, strict=True):
            yield from copied(state_of(self.optimizer, parameter), f"optimizer.{name}.")

    def loaded(self) -> None:
        """The parts are the tensors themselves."""
