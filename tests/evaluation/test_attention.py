from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.evaluation.attention import class_attention, why_no_attention
from medpretrain.models.backbones import create_backbone


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", channels=1, image_size=64).eval()


def by_hand(vit: nn.Module, images: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the last block's class token, (n, H, T), from the weights themselves."""
    seen: list[Tensor] = []
    handle = vit.blocks[-1].attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    vit(images)
    handle.remove()
    tokens, layer = seen[0], vit.blocks[-1].attn
    width, heads = tokens.shape[-1], layer.num_heads
    q, k, _ = (tokens @ layer.qkv.weight.T + layer.qkv.bias).split(width, dim=-1)
    per_head = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        logits = q[:, 0, None, part] @ k[:, :, part].transpose(1, 2) / (width // heads) ** 0.5
        per_head.append(logits[:, 0].softmax(dim=-1))
    return torch.stack(per_head, dim=1)


def test_the_maps_are_the_softmax_of_the_class_tokens_query(vit: nn.Module) -> None:
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, before = by_hand(vit, images), vit(images)
    found = class_attention(vit, images)
    assert found.maps_nHhw.shape == (2, 3, 4, 4)
    torch.testing.assert_close(found.maps_nHhw.flatten(2), expected[:, :, 1:])
    torch.testing.assert_close(found.prefix_nHP, expected[:, :, :1])
    total = found.maps_nHhw.sum(dim=(2, 3)) + found.prefix_nHP.sum(dim=2)
    torch.testing.assert_close(total, torch.ones(2, 3))
    assert vit.blocks[-1].attn.fused_attn  # left as it was
    assert not vit.blocks[-1].attn.attn_drop._forward_pre_hooks
    with torch.inference_mode():
        assert torch.equal(vit(images), before)


def test_a_patch_is_enlarged_to_its_own_pixels_and_rows_stay_rows(vit: nn.Module) -> None:
    images = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    found = class_attention(vit, images)
    pixels = found.enlarged(64)
    assert torch.equal(pixels[0, 1, 16:32, 48:64], found.maps_nHhw[0, 1, 1, 3].expand(16, 16))


def test_register_tokens_are_no_patches() -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, num_classes=0, depth=1).eval()
    found = class_attention(network, torch.randn(1, 3, 28, 28))
    assert (found.maps_nHhw.shape, found.prefix_nHP.shape) == ((1, 6, 2, 2), (1, 6, 5))


def test_the_layer_is_left_as_it_was_when_the_network_fails(vit: nn.Module) -> None:
    with pytest.raises(Exception, match="channels"):
        class_attention(vit, torch.zeros(1, 3, 64, 64))
    assert vit.blocks[-1].attn.fused_attn
    assert not vit.blocks[-1].attn.attn_drop._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet10t", {}, "ResNet has no attention"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "depth": 1}, "no class token"),
    ],
)
def test_networks_without_it_are_refused_by_name(name: str, options: dict, message: str) -> None:
    network = timm.create_model(name, num_classes=0, **options).eval()
    assert message in str(why_no_attention(network))
    with pytest.raises(UserError, match=message):
        class_attention(network, torch.zeros(1, 3, 64, 64))
