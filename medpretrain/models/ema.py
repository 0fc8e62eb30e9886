"""Teachers that follow a student."""

from __future__ import annotations

import copy

import torch
from timm.layers import DropPath
from torch import Tensor, nn


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
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    assert len(ours) == len(theirs)
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
