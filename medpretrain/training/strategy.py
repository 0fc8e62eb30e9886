"""How a method is spread over processes. One strategy so far: a full copy on each (DDP)."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medpretrain.data.batches import Views
from medpretrain.methods.base import Method, Outputs
from medpretrain.training.process import Process

_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters  # torch 2.15


class DistributedData:
    """A copy of the method on every process; gradients are averaged over processes during the backward pass."""

    def __init__(self, method: Method, process: Process, *, precision: str) -> None:
        self._device, self._bf16 = process.device, precision == "bf16"
        self._wrapped: nn.Module = method
        if process.world > 1:
            # Buffers stay each process's own: those that matter are the same everywhere by construction.
            keep_buffers = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
            devices = [process.device] if process.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(method, device_ids=devices, **keep_buffers)  # type: ignore[arg-type]

    def forward(self, views: Views) -> Outputs:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            outputs: Outputs = self._wrapped(views)
        return outputs

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Within it a backward pass only adds to the gradients of this process."""
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()
