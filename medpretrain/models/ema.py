"""Teachers that follow a student."""

from __future__ import annotations

import copy

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def held(parameter: Tensor) -> Tensor:
    """What this process has of a parameter: under FSDP2 and ZeRO-3 a part, alike for parameters of one shape."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy with the same weights that no optimizer will see, and that drops no paths.

    It stays in training mode, as its BatchNorm needs; a target that is drawn anew in each step is none.
    """
    copied = copy.deepcopy(module).requires_grad_(False)
    for layer in copied.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
    return copied


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters.

    Buffers stay: a teacher that sees its own views keeps its own BatchNorm statistics, as DINO's and MoCo's do.
    """
    ours = [held(parameter) for parameter in teacher.parameters()]
    theirs = [held(parameter) for parameter in student.parameters()]
    assert len(ours) == len(theirs)
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
