"""One step: schedules, clipping, and what a state dict holds."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medpretrain.data.batches import Batch
from medpretrain.methods.base import TrainingSet
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process
from medpretrain.training.trainer import Trainer

ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


VIEWS = {"modan_mulsupcon": {"crop": {"size": 32, "count": 2}}, "dino": {"global": {"size": 32, "count": 2}}}
SMALL = {"modan_mulsupcon": {"projector": [16, 8]}, "dino": {"prototypes": 16, "hidden": 16, "bottleneck": 8}}


def trainer(method="modan_mulsupcon", train=None, **optim):
    recipe = Recipe.model_validate(
        {
            "name": "one",
            "data": {"channels": 1, "labels": ["modality"]},
            "backbone": {"name": "test_vit"},
            "views": VIEWS[method],
            "method": {"name": method} | SMALL[method],
            "optim": {"name": "sgd", "lr": 0.1} | optim,
            "train": {"steps": 10, "global_batch": 4} | (train or {}),
        }
    )
    return Trainer(
        build_method(recipe, TrainingSet(4, {"modality": ("a", "b")}, {"modality": (2, 2)})),
        recipe,
        ALONE,
        total=10,
        steps_per_epoch=5.0,
    )


def batch(step):
    torch.manual_seed(step)
    views = {"crop": [torch.randn(4, 1, 32, 32) for _ in range(2)]}
    return Batch(
        step,
        seed=0,
        size=4,
        first=0,
        micro=[views],
        labels={"modality": torch.tensor([0, 1, 0, 1])},
        samples=torch.arange(4),
    )


def test_learning_rate_and_decay_follow_their_schedules():
    one = trainer(lr=0.2, lr_batch=8, warmup=0.4, final_lr=0.01, weight_decay=0.1, final_weight_decay=0.3)
    rates = [one.step(batch(step)).lr for step in range(10)]
    assert rates[:5] == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert rates[5] > rates[9] > 0.01
    decays = {group["decay"]: group["weight_decay"] for group in one.optimizer.param_groups}
    assert decays[False] == 0.0
    assert 0.29 < decays[True] < 0.3


def test_the_rate_of_each_layer_and_of_biases_follows_the_same_curve():
    one = trainer(lr=0.2, plain_lr=0.05, lr_batch=8, layer_decay=0.5, warmup=0.4, warmup_lr=0.02, final_lr=0.01)
    backbone = one.method.backbone
    last = dict(one.method.projector.named_parameters())
    chosen = {  # parameter, learning rate relative to lr: 6 blocks behind the stem
        "stem": (backbone.patch_embed.proj.weight, 0.5**7),
        "stem's bias": (backbone.patch_embed.proj.bias, 0.5**7 * 0.25),
        "last block": (backbone.blocks[5].attn.qkv.weight, 0.5),
        "last norm": (backbone.norm.weight, 0.5 * 0.25),
        "head": (next(p for p in last.values() if p.ndim > 1), 1.0),
        "head's bias": (next(p for p in last.values() if p.ndim == 1), 0.25),
    }
    for step in range(10):
        lr = one.step(batch(step)).lr
        rates = {parameter: group["lr"] for group in one.optimizer.param_groups for parameter in group["params"]}
        for name, (parameter, scale) in chosen.items():
            assert rates[parameter] == pytest.approx(lr * scale, rel=1e-12), name
        if step == 4:
            assert lr == pytest.approx(0.1)


def test_layer_decay_reaches_the_backbone_that_is_trained_and_no_head():
    one = trainer("dino", layer_decay=0.5)
    scales = {parameter: group["lr_scale"] for group in one.optimizer.param_groups for parameter in group["params"]}
    assert {scales[parameter] for parameter in one.method.student.parameters()} == {0.5**k for k in range(1, 8)}
    assert {scales[p] for p in one.method.student_head.parameters() if p.requires_grad} == {1.0}


@pytest.mark.parametrize(("key", "value"), [("plain_lr", 0), ("layer_decay", 0), ("layer_decay", 1.01)])
def test_a_rate_outside_its_range_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        trainer(**{key: value})


def test_a_step_lowers_the_loss_of_its_batch():
    one = trainer(lr=0.01)
    losses = [one.step(batch(0)).loss.item() for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("each", [False, True])
def test_gradients_are_clipped_together_or_each(each):
    one = trainer(clip=1e-3, clip_each=each)
    clipped = []
    one.optimizer.register_step_pre_hook(lambda *_: clipped.extend(p.grad.norm() for p in one.strategy.trained))
    measured = one.step(batch(0))
    norms = torch.stack(clipped)
    assert measured.grad_norm > 1e-3  # what is reported is the norm before
    largest = norms.max() if each else norms.norm()
    assert largest.item() == pytest.approx(1e-3, rel=1e-2)
    assert (norms.norm() > 2e-3) == each


def test_a_trainer_goes_on_from_its_state_as_if_never_stopped():
    one, other = trainer(name="adamw", lr=1e-3), trainer(name="adamw", lr=1e-3)
    for step in range(3):
        one.step(batch(step))
    kept = {part.name: part.values.clone() for part in one.parts()}
    for part in other.parts():
        part.values.copy_(kept[part.name])
    other.loaded()
    for step in range(3, 5):
        assert torch.equal(one.step(batch(step)).loss, other.step(batch(step)).loss)
    for a, b in zip(one.method.parameters(), other.method.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_everything_as_it_was(bad):
    one = trainer("modan_mulsupcon", name="adamw", lr=1e-3)
    one.step(batch(0))
    before = {part.name: part.values.clone() for part in one.parts()}
    spoilt = batch(1)
    spoilt.micro[0]["crop"][0][2, 0, 5, 5] = bad
    measured = one.step(spoilt)
    assert not measured.finite
    assert any("running_var" in name for name in before)  # BatchNorm saw the image on the way forward
    for part in one.parts():
        assert torch.equal(part.values, before[part.name]), part.name
    assert one.step(batch(2)).finite
    assert not torch.equal(next(iter(one.parts())).values, before[next(iter(one.parts())).name])


def test_frozen_parameters_and_their_moments_stand_still():
    one = trainer("dino", name="adamw", lr=1e-3)
    state = "optimizer.student_head.prototypes."

    def now():
        return {part.name: part.values.clone() for part in one.parts() if "student_head.prototypes" in part.name}

    first = now()
    assert set(first) == {"method.student_head.prototypes"} | {state + key for key in ("step", "exp_avg", "exp_avg_sq")}
    views = {"global": [torch.randn(4, 1, 32, 32) for _ in range(2)]}
    for step in range(6):
        one.step(dataclasses.replace(batch(step), micro=[views]))
        frozen = step < 5  # an epoch has 5 steps
        assert torch.equal(now()["method.student_head.prototypes"], first["method.student_head.prototypes"]) == frozen
    assert now()[state + "step"].item() == 1  # as if it had been new then


@pytest.mark.parametrize("changes", [{"compile": True}, {"channels_last": True}, {"checkpoint_activations": True}])
def test_what_makes_a_step_faster_or_smaller_does_not_change_it(changes, monkeypatch):
    # Inductor takes a minute for these blocks; what it makes of them is its own affair, how they are called is ours.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    plain, other = trainer("modan_mulsupcon"), trainer("modan_mulsupcon", train=changes)
    for step in range(3):
        expected, found = plain.step(batch(step)), other.step(batch(step))
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.grad_norm, expected.grad_norm, rtol=1e-4, atol=1e-6)
    assert [part.name for part in other.parts()] == [part.name for part in plain.parts()]
