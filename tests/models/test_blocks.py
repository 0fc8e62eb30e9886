"""Blocks are found, and computing them again changes nothing but memory."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from data_prep.errors import UserError
from medpretrain.models.blocks import blocks, checkpoint_activations


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("resnet18", 8, "BasicBlock"),
        ("resnet50", 16, "Bottleneck"),
        ("vit_tiny_patch16_224", 12, "Block"),
        ("convnext_atto", 12, "ConvNeXtBlock"),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
    ],
)
def test_the_blocks_of_an_architecture_are_all_found_and_nothing_else(name, count, kind):
    backbone = timm.create_model(name, num_classes=0)
    found = blocks(backbone)
    assert {type(block).__name__ for block in found} == {kind}
    assert len(found) == len(set(found)) == count == sum(type(one).__name__ == kind for one in backbone.modules())


def passed_through(backbone: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and gradients and buffers after one forward and backward pass."""
    torch.manual_seed(5)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(6)  # of drop path
    output = backbone(images)
    output.square().sum().backward()
    left = {name: value.grad for name, value in backbone.named_parameters()}
    return output.detach(), left | dict(backbone.named_buffers())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_computing_blocks_again_gives_the_same_bits_and_counts_a_step_once(name):
    options = {"drop_path_rate": 0.4} if name == "test_vit" else {}
    plain = timm.create_model(name, num_classes=0, img_size=32, **options) if options else timm.create_model(name)
    again = copy.deepcopy(plain)
    calls = []
    for block in blocks(again):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(again)
    (output, left), (same_output, same_left) = passed_through(plain.train()), passed_through(again.train())
    assert torch.equal(output, same_output)
    for key, value in left.items():
        assert torch.equal(value, same_left[key]), key
    tracked = [key for key in left if key.endswith("num_batches_tracked")]
    assert [int(same_left[key]) for key in tracked] == [1] * len(tracked)
    assert bool(tracked) == (name == "test_resnet")
    assert len(calls) == len(blocks(plain))


def test_inputs_of_blocks_alone_are_kept():
    """Or there would be no memory to win."""

    def kept_bytes(backbone: nn.Module) -> int:
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: seen.setdefault(tensor.data_ptr(), tensor) is None or tensor, lambda tensor: tensor
        ):
            backbone(torch.randn(4, 3, 64, 64)).sum().backward()
        return sum(tensor.numel() for tensor in seen.values())

    plain = timm.create_model("resnet18", num_classes=0).train()
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    torch.manual_seed(0)
    assert kept_bytes(again) < kept_bytes(plain)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match="no blocks"):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2)))
