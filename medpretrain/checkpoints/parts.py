"""What a process has of the state of a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The elements of one tensor that this process holds.

    Attributes:
        name: of the tensor, such as `method.student.norm.weight` or `optimizer.student.norm.weight.exp_avg`.
        shape: of the whole tensor.
        values: where `copied` the whole tensor, in any layout; else (n,), contiguous, n >= 0.
        start: the place of `values[0]` in the whole tensor laid out row by row.
        copied: whether every process holds the same whole tensor; else these elements are this process's alone.
    """

    name: str
    shape: tuple[int, ...]
    values: Tensor
    start: int = 0
    copied: bool = True
