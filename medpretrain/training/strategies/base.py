"""What a strategy answers to, so that a step is the same code however the networks are spread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from medpretrain.checkpoints.parts import Part
from medpretrain.data.batches import Views
from medpretrain.methods.base import Method, Outputs
from medpretrain.recipe import Recipe
from medpretrain.training.optimizers import WholeNorms, first_state
from medpretrain.training.process import Process

MakeOptimizer = Callable[[Mapping[str, nn.Parameter], WholeNorms], torch.optim.Optimizer]
"""An optimizer of parameters by name; of those that a strategy takes apart it is given this process's parts."""


class Strategy(ABC):
    """A method and its optimizer, spread over processes.

    Attributes:
        method: as it was given; its parameters may have become parts.
        names: of the trained parameters, in one order everywhere.
        trained: what this process has of each of them.
        optimizer: its groups carry the learning rates that a schedule writes.
    """

    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __init__(self, method: Method, recipe: Recipe, process: Process) -> None:
        self.method, self.process = method, process
        self._bf16 = recipe.train.precision == "bf16"
        self.names = [name for name, value in method.named_parameters() if value.requires_grad]

    def forward(self, views: Views) -> Outputs:
        """The method's outputs, in the precision of the recipe."""
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self._bf16):
            outputs: Outputs = self._wrapped(views)
        return outputs

    @property
    @abstractmethod
    def _wrapped(self) -> nn.Module:
        """What is called in place of the method."""

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Within it a forward and its backward pass are not the last of the step."""
        return nullcontext()

    @abstractmethod
    def backward(self, values: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        """Take gradients of `values` back to the parameters, where they add up; after the last call of a step they are
        the mean over processes.

        Args:
            values: of this process; parameters may be among them.
            gradients: one for each.
        """

    @abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """This process's part of each trained parameter's gradient, in the order of `names`, to be changed in place;
        None where it has none."""

    def whole_norms(self, norms_N: Tensor, trained: Sequence[Tensor]) -> Tensor:
        """Norms of whole tensors, (N,), from those of this process's parts; a collective where they are in parts.

        Args:
            trained: which of `trained` they are of.
        """
        return norms_N

    @abstractmethod
    def step(self) -> None:
        """Let the optimizer update the parameters, and forget the gradients."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not taken."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """All that changes over time: `method.NAME` for parameters and buffers, `optimizer.PARAMETER.KEY`.

        Their `values` are the live tensors: a checkpoint is read into them.
        """

    @abstractmethod
    def loaded(self) -> None:
        """Called when a checkpoint has been read into `parts`."""


def copied(state: Mapping[str, Any], prefix: str) -> Iterator[Part]:
    """The parts of a state that every process holds whole."""
    for name, value in state.items():
        yield Part(f"{prefix}{name}", tuple(value.shape), value.detach())


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors for a parameter; zeros where it has not stepped yet, which it takes for the same."""
    state = optimizer.state[parameter]
    if not state:
        state.update(first_state(optimizer, parameter))
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
