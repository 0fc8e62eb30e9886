"""The repeated blocks of a backbone: what is sharded, compiled and computed again one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_prep.errors import UserError
from medpretrain.models.batchnorm import Statistics
from medpretrain.models.drop_path import KeyedDropPath


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks in their order: the children of the longest ModuleLists and Sequentials that hold alike modules.

    That is a Vision Transformer's `blocks`, a ResNet's residual blocks and a ConvNeXt's; empty where there are none.

    >>> import timm
    >>> len(blocks(timm.create_model("resnet18"))), len(blocks(timm.create_model("vit_tiny_patch16_224")))
    (8, 12)
    """
    found: list[nn.Module] = []
    for child in backbone.children():
        inside = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        kinds = {type(one) for one in inside}
        if inside and len(kinds) == 1 and any(True for _ in inside[0].children()):
            deeper = [block for one in inside for block in blocks(one)] if _is_stage(inside[0]) else []
            found += deeper or inside
        else:
            found += blocks(child)
    return found


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds blocks of its own, as a stage of ConvNeXt or Swin does."""
    return any(
        isinstance(child, nn.ModuleList | nn.Sequential) and any(True for one in child for _ in one.children())
        for child in module.children()
    )


def checkpoint_activations(backbone: nn.Module) -> None:
    """Let each block keep its input alone and be computed again in the backward pass (Chen et al. 2016), in place.

    The second computation records no BatchNorm statistics, so that a step counts once, and draws what the first drew.

    Raises:
        UserError: no blocks are found.
    """
    found = blocks(backbone)
    if not found:
        raise UserError(f"{type(backbone).__name__} has no blocks to compute again; leave train.checkpoint_activations")
    for block in found:
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, context_fn=partial(_contexts, block)
        )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    draws = [(layer, layer.kept) for layer in block.modules() if isinstance(layer, KeyedDropPath)]
    return nullcontext(), _again(block, draws)


@contextmanager
def _again(block: nn.Module, draws: list[tuple[KeyedDropPath, Tensor | None]]) -> Iterator[None]:
    """The second computation: paths are dropped as in the first, though the backbone may have been called since, and
    what BatchNorm records is taken back. Not to record it would not do: the second computation must save for its
    backward pass what the first has saved."""
    statistics = Statistics(block)
    for layer, kept in draws:
        layer.kept = kept
    try:
        yield
    finally:
        statistics.take_back()
