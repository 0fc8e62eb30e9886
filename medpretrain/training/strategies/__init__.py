"""How a method is spread over processes: DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import importlib

from data_prep.errors import UserError
from medpretrain.methods.base import Method
from medpretrain.models.blocks import blocks, checkpoint_activations
from medpretrain.recipe import Recipe
from medpretrain.training.process import Process
from medpretrain.training.strategies.base import MakeOptimizer, Strategy

# Each in a module of its own, imported when it is asked for: DeepSpeed's import takes seconds.
_STRATEGIES = {"ddp": "Ddp", "fsdp2": "Fsdp2", "deepspeed": "DeepSpeed"}


def refuse_strategy(recipe: Recipe, method: type[Method]) -> None:
    """Raises:
    UserError: the strategy cannot train what the recipe says; says which one can.
    """
    train, name = recipe.train, recipe.strategy
    if train.channels_last and name != "ddp":
        raise UserError(f"strategy {name} cuts tensors row by row and train.channels_last is another order; use ddp")
    if name != "deepspeed":
        return
    zero = f"strategy deepspeed with train.zero_stage={train.zero_stage}"
    if recipe.optim.name == "lars" and train.zero_stage:
        raise UserError(f"{zero} has no norms of whole parameters, which optim.name=lars needs; use ddp or fsdp2")
    if method.read_by_loss and train.zero_stage == 3:
        raise UserError(
            f"{zero} has no whole parameters where the loss of {recipe.method['name']} reads them: "
            f"{', '.join(method.read_by_loss)}; use train.zero_stage=2 or fsdp2"
        )
    if train.compile and train.zero_stage == 3:
        raise UserError(f"{zero} gathers parameters in hooks that train.compile does not see; use fsdp2")


def spread(method: Method, recipe: Recipe, process: Process, make_optimizer: MakeOptimizer) -> Strategy:
    """The method under the recipe's strategy, with the optimizer of what this process has of it.

    Raises:
        UserError: see `refuse_strategy`; or the backbone has no blocks where they are asked for.
    """
    refuse_strategy(recipe, type(method))
    if recipe.train.checkpoint_activations:
        checkpoint_activations(method.trained)
    if recipe.train.compile:
        for block in blocks(method.trained) or [method.trained]:
            block.compile()
    module = importlib.import_module(f"medpretrain.training.strategies.{recipe.strategy}")
    strategy: Strategy = getattr(module, _STRATEGIES[recipe.strategy])(method, recipe, process, make_optimizer)
    return strategy
