"""Where a Vision Transformer's class token looks in the last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError


@dataclass(frozen=True)
class Attention:
    """The attention of the class token of n images, a distribution over all tokens for each of H heads.

    Attributes:
        maps_nHhw: over the h x w patches.
        prefix_nHP: over the class token itself and any register tokens; what is left of 1.
    """

    maps_nHhw: Tensor
    prefix_nHP: Tensor

    def enlarged(self, size: int) -> Tensor:
        """The maps as (n, H, size, size): a patch's attention stays its own over its pixels, nothing is smoothed."""
        return F.interpolate(self.maps_nHhw, size=(size, size), mode="nearest-exact")


def why_no_attention(backbone: nn.Module) -> str | None:
    """Why `class_attention` cannot be had of a backbone; None where it can."""
    blocks, name = getattr(backbone, "blocks", None), type(backbone).__name__
    layer = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) and blocks else None
    if layer is None or not hasattr(layer, "num_heads"):
        return f"a {name} has no attention"
    if not (hasattr(layer, "fused_attn") and isinstance(getattr(layer, "attn_drop", None), nn.Module)):
        return f"the attention of a {name} is not one that can be read"
    if getattr(backbone, "cls_token", None) is None:
        return f"this {name} has no class token whose attention could be shown"
    return None


def class_attention(backbone: nn.Module, images_nCSS: Tensor) -> Attention:
    """The attention of the class token in the last block: softmax of its query with all keys, each head by itself.

    As shown by Caron et al. 2021 (DINO), figure 1. timm's fused attention does not hold the weights, so that one layer
    computes them for this call; the backbone is left as it was.

    Args:
        backbone: one of timm's Vision Transformers, in eval mode, on the images' device.
        images_nCSS: preprocessed.

    Raises:
        UserError: a network that has no attention, or no class token.
    """
    reason = why_no_attention(backbone)
    if reason is not None:
        raise UserError(reason)
    assert not backbone.training, "dropout would be shown as attention"
    network: Any = backbone
    layer = network.blocks[-1].attn
    seen: list[Tensor] = []
    # What timm drops out of are the weights after the softmax.
    handle = layer.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    fused, layer.fused_attn = layer.fused_attn, False
    try:
        with torch.inference_mode():
            backbone(images_nCSS)
    finally:
        handle.remove()
        layer.fused_attn = fused
    (weights_nHTT,) = seen
    prefix = network.num_prefix_tokens
    sides, patches = images_nCSS.shape[2:], network.patch_embed.patch_size
    high, wide = (side // patch for side, patch in zip(sides, patches, strict=True))
    of_class_nHT = weights_nHTT[:, :, 0].float()
    tokens = of_class_nHT.shape[2]
    assert tokens == prefix + high * wide, f"{tokens} tokens, not {prefix} + {high} x {wide}"
    return Attention(of_class_nHT[:, :, prefix:].unflatten(2, (high, wide)), of_class_nHT[:, :, :prefix])
