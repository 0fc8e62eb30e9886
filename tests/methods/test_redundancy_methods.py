"""Barlow Twins, VICReg and BYOL: what each computes from its views, and what it updates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.redundancy import barlow_twins, vicreg
from medpretrain.methods.barlow_twins import BarlowTwins, BarlowTwinsOptions
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.byol import Byol, ByolOptions
from medpretrain.methods.vicreg import VicReg, VicRegOptions

DATA = TrainingSet(samples=20)


class Flat(nn.Module):
    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.layer(F.adaptive_avg_pool2d(x, 2).flatten(1)))


def build(name):
    torch.manual_seed(0)
    if name == "byol":
        return Byol(ByolOptions(projector=(8, 5), predictor=(7, 5)), Flat(), DATA).train()
    if name == "vicreg":
        return VicReg(VicRegOptions(projector=(8, 5)), Flat(), DATA).train()
    return BarlowTwins(BarlowTwinsOptions(projector=(8, 5)), Flat(), DATA).train()


def two_crops(n=6, seed=1, count=2):
    torch.manual_seed(seed)
    # Views of unlike scale, so that BatchNorm over both together would show.
    return {"crop": [torch.randn(n, 1, 8, 8) * (1 + 2 * view) + view for view in range(count)]}


def batch(step=0, size=6):
    return Batch(step=step, seed=0, size=size, first=0, micro=[], labels={}, samples=torch.arange(size))


def progress(step=0, total=10):
    return Progress(step, total, step / 5)


NAMES = ["barlow_twins", "vicreg", "byol"]


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_each_view_has_a_pass_of_its_own_and_the_loss_is_that_of_the_pair(name):
    method = build(name)
    views = two_crops()
    outputs = method(views)
    assert outputs["z"].shape == (6, 2, 5)
    assert outputs["features"].shape == (6, 2, 6)
    assert not outputs["features"].requires_grad
    z1, z2 = (method.projector(method.backbone(view)) for view in views["crop"])
    torch.testing.assert_close(outputs["z"], torch.stack([z1, z2], dim=1))
    expected = {
        "barlow_twins": barlow_twins(z1, z2, off_diagonal_weight=0.0051),
        "vicreg": vicreg(z1, z2, invariance=25, variance=25, covariance=1),
    }
    torch.testing.assert_close(method.loss(outputs, batch(), progress()), expected[name])


def test_byols_loss_is_between_each_prediction_and_the_other_views_target():
    method = build("byol")
    for parameter in method.momentum_encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    views = two_crops()
    outputs = method(views)
    assert outputs["query"].shape == outputs["key"].shape == (6, 2, 5)
    assert outputs["features"].shape == (6, 2, 6)
    p, t = [], []
    for view in views["crop"]:
        p.append(method.predictor(method.encoder["projector"](method.encoder["backbone"](view))))
        t.append(method.momentum_encoder["projector"](method.momentum_encoder["backbone"](view)))
    cosines = [F.cosine_similarity(p[0], t[1]), F.cosine_similarity(p[1], t[0])]
    expected = sum(2 - 2 * cosine.mean() for cosine in cosines)
    torch.testing.assert_close(method.loss(outputs, batch(), progress()), expected)


@pytest.mark.parametrize("method", [BarlowTwins, VicReg])
def test_a_batch_of_one_has_no_statistics(method):
    with pytest.raises(UserError, match=r"train\.global_batch"):
        method.check(method.options(), DATA, 1)
    method.check(method.options(), DATA, 2)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_a_loss_teaches_backbone_and_projector(name):
    method = build(name)
    method.loss(method(two_crops()), batch(), progress()).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert method.backbone.layer.weight.grad.abs().sum() > 0


def test_byol_teaches_encoder_and_predictor_and_never_the_target():
    method = build("byol")
    method.loss(method(two_crops()), batch(), progress()).backward()
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    assert all(parameter.grad is not None for parameter in method.predictor.parameters())
    assert method.exported is method.encoder["backbone"]


def test_byols_momentum_rises_from_its_start_to_one():
    method = build("byol")
    for step, momentum in ((0, 0.99), (5, 0.995), (10, 1.0)):
        target, source = method.momentum_encoder["backbone"].layer.weight, method.encoder["backbone"].layer.weight
        source.data.fill_(1.0)
        target.data.fill_(0.0)
        method.after_update({}, batch(step), progress(step))
        torch.testing.assert_close(target, torch.full_like(target, 1 - momentum), rtol=1e-5, atol=0)


def test_a_predictor_into_another_space_is_refused():
    with pytest.raises(ValidationError, match="same width, not 6 and 5"):
        ByolOptions(projector=(8, 5), predictor=(7, 6))


@pytest.mark.parametrize("options", [BarlowTwinsOptions, VicRegOptions, ByolOptions])
@pytest.mark.parametrize("widths", [(), (8, 0)])
def test_a_projector_without_width_is_refused(options, widths):
    with pytest.raises(ValidationError):
        options(projector=widths)


def train(method, steps):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        outputs = method(two_crops(seed=step))
        method.loss(outputs, batch(step), progress(step)).backward()
        optimizer.step()
        method.after_update(outputs, batch(step), progress(step))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_loaded_from_its_state_goes_on_bit_for_bit(name):
    one = build(name)
    train(one, range(2))
    state = copy.deepcopy(one.state_dict())
    other = build(name)
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    other.load_state_dict(state)
    for method in (one, other):
        train(method, range(2, 4))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_coupled_is_coupled_in_the_loss_and_not_in_the_forward_pass(name):
    method = build(name).eval()
    views = two_crops()
    parts = [method({"crop": [view[rows] for view in views["crop"]]}) for rows in (slice(0, 2), slice(2, 6))]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    whole = method.loss(method(views), batch(), progress())
    torch.testing.assert_close(method.loss(joined, batch(), progress()), whole)
