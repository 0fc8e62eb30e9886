"""The only place where embeddings cross ranks, and the reduce-scatter that their gradients come home by."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_scatter(own: Tensor, whole: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill `own` with this rank's part of the sum over ranks of `whole`; both contiguous, the same bits each time.

    Gloo would sum everything to every rank and keep a part, twice the bytes: there ranks send each other the parts and
    sum their own.
    """
    if dist.get_backend(group) != "gloo":
        dist.reduce_scatter_tensor(own, whole, group=group)
        return
    parts = torch.empty_like(whole)
    dist.all_to_all_single(parts, whole, group=group)
    torch.sum(parts.view(-1, *own.shape), dim=0, out=own)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        # Every rank's loss reaches every row; each rank needs the sum for its own rows alone.
        own = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        reduce_scatter(own, grad.contiguous())
        return own


def gather(x: Tensor) -> Tensor:
    """All ranks' rows in rank order, (world * n, ...), with the exact gradient of the sum of all ranks' losses.

    DistributedDataParallel averages gradients over ranks, so when each rank's loss is the mean over its own rows the
    parameters get the gradient of the mean over the global batch.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor without gradient over equal ranks; the same bits on each."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
