"""The gradient on several ranks, each with its own data, is that of one process with the global batch."""

from __future__ import annotations

import pytest

from medpretrain.methods import METHODS


def test_every_method_is_tried(exactness):
    assert set(exactness.CASES) == set(METHODS)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "world", "backbone", "micro_batches"),
    [
        ("ddp", 2, "resnet", 1),
        ("ddp", 3, "resnet", 1),
        ("ddp", 2, "vit", 2),
        ("fsdp2", 3, "resnet", 1),
        ("fsdp2", 2, "vit", 2),
    ],
)
def test_ranks_with_different_data_have_the_gradient_of_the_global_batch(
    strategy, world, backbone, micro_batches, exactness
):
    # What FSDP2 may do wrong is in how networks are called: a teacher, a queue, a loss that reads parameters.
    methods = sorted(METHODS) if strategy == "ddp" else ["amimv", "bcl", "dino", "kcl", "modan_mulsupcon"]
    ranks = exactness.on_ranks(methods, [backbone], world, micro_batches, strategy)
    for method in methods:
        single = exactness.gradients(exactness.ALONE, method, backbone, plain_heads=micro_batches > 1)
        for rank in ranks:
            same(exactness.compare(rank[f"{method} {backbone}"], single), method)


def same(found, method):
    assert abs(found["ratio"] - 1) < 1e-8, (method, found)
    assert abs(found["cosine"] - 1) < 1e-8, (method, found)
    assert found["buffers"] < 1e-7, (method, found)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_goes_on_from_its_state_to_the_bit(method, exactness):
    assert exactness.resumed_to_the_bit(method, "resnet")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_micro_batches_give_the_gradient_of_the_whole_batch(method, exactness):
    """Without BatchNorm, whose statistics are a micro-batch's own, as documented."""
    single = exactness.gradients(exactness.ALONE, method, "vit", plain_heads=True)
    parts = exactness.gradients(exactness.ALONE, method, "vit", micro_batches=3, plain_heads=True)
    same(exactness.compare(parts, single), method)


def test_the_test_would_see_a_loss_of_the_local_batch_alone(exactness, monkeypatch):
    """Half a batch by itself has another gradient: the data are different enough to tell."""
    whole = exactness.gradients(exactness.ALONE, "modan_mulsupcon", "vit")
    monkeypatch.setattr(exactness, "IMAGES", 6)
    half = exactness.gradients(exactness.ALONE, "modan_mulsupcon", "vit")
    assert exactness.compare(half, whole)["cosine"] < 0.999


def test_the_test_would_see_a_state_that_is_not_saved(exactness, monkeypatch):
    from medpretrain.training.trainer import Trainer

    everything = Trainer.parts
    monkeypatch.setattr(Trainer, "parts", lambda self: [p for p in everything(self) if p.name.startswith("method.")])
    assert not exactness.resumed_to_the_bit("supcon", "resnet")
