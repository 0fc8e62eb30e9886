"""Paths are dropped by image, whatever process or micro-batch the image is in."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import DropPath

from data_prep.errors import UserError
from medpretrain.models.blocks import checkpoint_activations
from medpretrain.models.drop_path import DropPaths, KeyedDropPath


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=32, drop_path_rate=0.5).train()


def test_an_image_has_the_same_draws_in_any_part_of_the_batch_and_others_in_another_view_step_or_seed():
    backbone = vit()
    paths = DropPaths(backbone)
    images = torch.randn(1, 3, 32, 32).expand(12, -1, -1, -1)  # all alike: what differs is drawn

    def features(seed, step, first, count, views=1):
        paths.begin(seed, step, first, count)
        return backbone(images[: views * count]).detach()

    whole = features(0, 3, 0, 6, views=2)
    assert torch.equal(features(0, 3, 0, 6, views=2), whole)
    for first, count in ((0, 3), (3, 3), (4, 2)):
        part = features(0, 3, first, count, views=2)
        torch.testing.assert_close(
            part, torch.cat([whole[first : first + count], whole[6 + first : 6 + first + count]])
        )
    assert not torch.allclose(whole[:6], whole[6:])
    assert len(whole.unique(dim=0)) > 6
    for other in (features(1, 3, 0, 6, views=2), features(0, 4, 0, 6, views=2)):
        assert not torch.allclose(other, whole)


def test_two_calls_of_a_pass_draw_apart():
    backbone = vit()
    paths = DropPaths(backbone)
    images = torch.randn(1, 3, 32, 32).expand(6, -1, -1, -1)
    paths.begin(0, 0, 0, 6)
    assert not torch.allclose(backbone(images), backbone(images))


def test_paths_are_dropped_as_often_as_asked_and_the_rest_is_scaled():
    backbone = vit()
    paths = DropPaths(backbone)
    layers = [layer for layer in backbone.modules() if isinstance(layer, KeyedDropPath)]
    assert layers
    assert not [layer for layer in backbone.modules() if type(layer) is DropPath and layer.drop_prob]
    paths.begin(0, 0, 0, 4000)
    paths._draw(backbone, (torch.empty(4000, 1),))
    for layer in layers:
        assert layer.kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - layer.drop_prob)])
        assert (layer.kept == 0).float().mean().item() == pytest.approx(layer.drop_prob, abs=0.04)


def test_nothing_is_dropped_outside_training():
    backbone = vit()
    plain = copy.deepcopy(backbone).eval()
    DropPaths(backbone)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), plain(images))


def test_blocks_computed_again_drop_what_they_dropped_though_the_backbone_was_called_since():
    plain = vit()
    again = copy.deepcopy(plain)
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for backbone in (plain, again):
        paths = DropPaths(backbone)
        if backbone is again:
            checkpoint_activations(backbone)
        paths.begin(0, 0, 0, 2)
        (backbone(images) + backbone(images.flip(0))).square().sum().backward()
        gradients.append({name: value.grad for name, value in backbone.named_parameters()})
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


def test_a_backbone_that_drops_paths_of_other_things_is_refused():
    layer = KeyedDropPath(0.5).train()
    layer.kept = torch.ones(3)
    with pytest.raises(UserError, match="drop_path"):
        layer(torch.ones(6, 2))
