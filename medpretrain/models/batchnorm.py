"""Batch normalisation over the images of all ranks, on CPU too.

Statistics of one rank's share make a run depend on the number of ranks. torch's SyncBatchNorm mends that but refuses
CPU tensors, so on CPU the layer here is used; it serves tests and runs on several CPU ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_prep.errors import UserError


class _SumOverRanks(torch.autograd.Function):
    """All-reduce; each rank's loss depends on the sum, so the gradient is summed over the ranks too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(grads[0])
        return total


class GlobalBatchNorm(_BatchNorm):
    """nn.BatchNorm1d, 2d or 3d with the statistics of the global batch while training.

    y = (x - mean) / sqrt(var + eps) * weight + bias with mean and biased variance per channel over all positions of all
    ranks (Ioffe & Szegedy 2015). The mean is summed first and the squares are centred on it, so nothing cancels. Ranks
    may hold different numbers of images, even none. Gradients of the input are those of the sum of all ranks' losses;
    parameter gradients are one rank's share, for the strategy to sum. In eval mode, without a process group or in a
    world of one it is torch's own batch norm. All ranks must call it the same number of times.

    Arguments are those of nn.BatchNorm2d. Input and output are [N, C, ...] in any float dtype; half precision is
    normalised in float32.

    Raises:
        ValueError: an input with fewer than 2 dimensions, or one value per channel in the whole global batch.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs an input [N, C, ...], not one with {input.ndim} dimension(s)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, ...]."""
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        over = [dim for dim in range(x.ndim) if dim != 1]
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_full((1,), x.numel() // x.shape[1])
        totals = _SumOverRanks.apply(torch.cat([x.sum(over), count]))
        n = totals[-1]
        if n <= 1:
            raise ValueError(f"batch norm needs more than {int(n)} value(s) per channel in the global batch to train")
        mean = totals[:-1] / n
        centred = x - mean.view(per_channel)
        var = _SumOverRanks.apply(centred.square().sum(over)) / n
        self._track(mean.detach(), var.detach() * n / (n - 1))
        y = centred * torch.rsqrt(var + self.eps).view(per_channel)
        if self.weight is not None:
            y = y * self.weight.view(per_channel)
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # No momentum means a plain average over all batches, as in torch.
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), rate)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d (batch norm, drop, activation in one layer) over the global batch."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, H, W], then drop and activate."""
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


def use_global_batchnorm(module: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Let every batch norm in `module` see the global batch, in place; names, parameters and buffers stay the same.

    On CUDA the layers become torch's SyncBatchNorm (timm's variant for BatchNormAct2d), elsewhere `GlobalBatchNorm`.

    Args:
        module: changed in place; if it is a batch norm itself, the new layer is what is returned.
        device: where it will train; None: where its first parameter or buffer lies.

    Returns:
        `module`, or its replacement.

    Raises:
        UserError: a batch norm of an unknown class, whose forward cannot be kept.

    >>> layers = use_global_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    >>> type(layers[1]).__name__, "1.running_mean" in layers.state_dict()
    ('GlobalBatchNorm', True)
    """
    norms = {path: child for path, child in module.named_modules(remove_duplicate=False) if _is_local(path, child)}
    if not norms:
        return module
    if device is None:
        tensors = [*module.parameters(), *module.buffers()]
        device = tensors[0].device if tensors else "cpu"
    if torch.device(device).type == "cuda":
        converted: nn.Module = timm_convert_sync_batchnorm(module)
        return converted
    # One replacement a layer, however many names the layer has.
    replacements = {id(child): _replacement(child) for child in norms.values()}
    for path, child in norms.items():
        if path == "":
            return replacements[id(child)]
        module.set_submodule(path, replacements[id(child)])
    return module


def _is_local(path: str, module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or isinstance(module, (GlobalBatchNorm, nn.SyncBatchNorm)):
        return False
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d):
        raise UserError(
            f"{path or 'the layer'} is a {type(module).__name__}: its statistics cannot be taken over all ranks"
        )
    return True


def _replacement(norm: _BatchNorm) -> GlobalBatchNorm:
    kind = GlobalBatchNormAct if isinstance(norm, BatchNormAct2d) else GlobalBatchNorm
    # Built without tensors (affine and tracking off), then given the layer's own.
    new = kind(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
    new.affine, new.track_running_stats = norm.affine, norm.track_running_stats
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    if isinstance(norm, BatchNormAct2d):
        new.drop, new.act = norm.drop, norm.act
    return new.train(norm.training)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm uses a batch's statistics but does not record them: a pass that will be repeated counts once."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    recorded = [layer.track_running_stats for layer in norms]
    for layer in norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, was in zip(norms, recorded, strict=True):
            layer.track_running_stats = was


class Statistics:
    """What the BatchNorm layers of `module` have recorded, to be taken back after a pass that must not count."""

    def __init__(self, module: nn.Module) -> None:
        norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self._live = [buffer for layer in norms for buffer in layer.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are now."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def take_back(self) -> None:
        """Make them what they were when `keep` was called."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
