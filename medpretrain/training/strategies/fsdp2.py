"""FSDP2: parameters, gradients and optimizer state in parts, a block's parameters whole while it is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from medpretrain.checkpoints.parts import Part
from medpretrain.losses.gather import reduce_scatter
from medpretrain.methods.base import Method
from medpretrain.models.blocks import blocks
from medpretrain.models.ema import held
from medpretrain.recipe import Recipe
from medpretrain.training.process import Process
from medpretrain.training.strategies.base import MakeOptimizer, Strategy, copied, state_of


class Fsdp2(Strategy):
    """Each network in parts over all processes, cut along its first dimension; small parameters of the method itself,
    those that its loss reads and those of one row stay whole.

    The optimizer sees this process's parts as plain tensors, so any optimizer works that treats elements alone, and
    LARS by the norms of the whole.
    """

    def __init__(self, method: Method, recipe: Recipe, process: Process, make_optimizer: MakeOptimizer) -> None:
        super().__init__(method, recipe, process)
        if process.world > 1:
            mesh = init_device_mesh(process.device.type, (process.world,))
            read_by_loss = {method.get_submodule(name) for name in method.read_by_loss}
            for network in _networks(method):
                if network not in read_by_loss:
                    # A position embedding (1, N, D) cannot be cut along its first dimension: every other process would
                    # send padding of its size, at 512 processes 310 MB each time for a ViT-B's of 0.6 MB.
                    whole = {
                        parameter for parameter in network.parameters() if parameter.ndim == 0 or len(parameter) == 1
                    }
                    for block in blocks(network):
                        fully_shard(block, mesh=mesh, ignored_params=whole)
                    # A network of which no gradient is asked would otherwise stay whole after its forward pass.
                    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
                    if dist.get_backend(mesh.get_group()) == "gloo":
                        for module in network.modules():
                            if isinstance(module, FSDPModule):
                                module.set_custom_reduce_scatter(_GlooReduceScatter())  # type: ignore[arg-type]
        parameters = dict(method.named_parameters())
        self._parameters = [parameters[name] for name in self.names]
        # They share their memory with the parameters.
        self.trained = [nn.Parameter(held(parameter)) for parameter in self._parameters]
        self._whole = {
            part for part, value in zip(self.trained, self._parameters, strict=True) if not isinstance(value, DTensor)
        }
        self.optimizer = make_optimizer(dict(zip(self.names, self.trained, strict=True)), self.whole_norms)

    @property
    def _wrapped(self) -> nn.Module:
        return self.method

    def backward(self, values: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        torch.autograd.backward(values, gradients)  # each call averages over processes what is in parts, and adds it up
        if last and self.process.world > 1:
            for parameter in self._parameters:
                if not isinstance(parameter, DTensor) and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.process.world

    def gradients(self) -> list[Tensor | None]:
        return [None if value.grad is None else held(value.grad) for value in self._parameters]

    def whole_norms(self, norms_N: Tensor, trained: Sequence[Tensor]) -> Tensor:
        if self.process.world == 1:
            return norms_N
        # A whole one counts on one process. In float64, or the square of a large norm would be infinite.
        counts = [self.process.leads or one not in self._whole for one in trained]
        squares = norms_N.double().square() * torch.tensor(counts, device=norms_N.device)
        dist.all_reduce(squares)
        return squares.sqrt().to(norms_N.dtype)

    def step(self) -> None:
        for part, gradient in zip(self.trained, self.gradients(), strict=True):
            part.grad = gradient
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for tensor in (*self.trained, *self._parameters):
            tensor.grad = None

    def parts(self) -> Iterator[Part]:
        buffers = dict(self.method.named_buffers())
        for name, value in self.method.state_dict().items():
            yield from self._cut(f"method.{name}", {"": value}, of=value if name not in buffers else None)
        for name, part, parameter in zip(self.names, self.trained, self._parameters, strict=True):
            yield from self._cut(f"optimizer.{name}.", state_of(self.optimizer, part), of=parameter)

    def loaded(self) -> None:
        """The parts are the tensors themselves."""

    def _cut(self, prefix: str, tensors: Mapping[str, Tensor], of: Tensor | None) -> Iterator[Part]:
        """Tensors of a parameter: those of its shape are cut as it is."""
        if not isinstance(of, DTensor):
            yield from copied(tensors, prefix)
            return
        rows, *rest = of.shape
        start = min(rows, self.process.rank * math.ceil(rows / self.process.world)) * math.prod(rest)
        for key, tensor in tensors.items():
            local = held(tensor).detach()
            if local.shape == held(of).shape:
                yield Part(f"{prefix}{key}", tuple(of.shape), local.view(-1), start, copied=False)
            else:
                yield from copied({key: local}, prefix)


class _GlooReduceScatter:
    """What FSDP2 calls in place of its own; torch keeps the base class of it private."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Done when it returns, also with `async_op`, which FSDP2 does not ask for.

        Raises:
            ValueError: `op` is neither the sum nor the mean. FSDP2 takes the mean of float32 and bf16, and divides
                others before and after their sum.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"a reduce-scatter on gloo gives a sum or a mean, not {op}")
        reduce_scatter(output_tensor, input_tensor, group)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters that are called, outermost first; containers are not."""
    for child in module.children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            yield from _networks(child)
        elif any(True for _ in child.parameters()):
            yield child
