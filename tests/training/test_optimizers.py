import copy
import io
import re

import pytest
import timm
import torch
from torch import nn

from data_prep.errors import UserError
from medpretrain.training.optimizers import Lars, build_optimizer, clip_, l2_norms, layer_lr_scales


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def build(module, name, lr=0.1, weight_decay=0.05, **scales):
    return build_optimizer(
        module.named_parameters(),
        name=name,
        lr=lr,
        momentum=0.9,
        weight_decay=weight_decay,
        betas=(0.9, 0.95),
        **scales,
    )


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_only_matrices_are_decayed(name):
    module = network()
    decayed, plain = build(module, name).param_groups
    assert (decayed["decay"], decayed["weight_decay"]) == (True, 0.05)
    assert (plain["decay"], plain["weight_decay"]) == (False, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert len(plain["params"]) == 4


def test_a_bias_with_two_dimensions_is_not_decayed():
    module = nn.Module()
    module.bias = nn.Parameter(torch.zeros(2, 2))
    (group,) = build(module, "sgd").param_groups
    assert group["decay"] is False


def test_biases_and_norms_have_a_learning_rate_of_their_own():
    module = network()
    decayed, plain = build(module, "sgd", lr=0.2, plain_lr=0.0048).param_groups
    assert (decayed["lr"], decayed["lr_scale"]) == (0.2, 1.0)
    assert plain["lr"] == pytest.approx(0.0048)
    assert plain["lr_scale"] == pytest.approx(0.024)
    assert len(plain["params"]) == 4


def scale_by_name(backbone, decay):
    scales = layer_lr_scales(backbone, decay)
    assert len(scales) == len(list(backbone.parameters()))
    return {name: scales[parameter] for name, parameter in backbone.named_parameters()}


def test_layers_of_a_vision_transformer_learn_the_slower_the_nearer_to_the_pixels():
    depth = 13  # the stem and 12 blocks
    for name, scale in scale_by_name(timm.create_model("vit_tiny_patch16_224", num_classes=0), 0.7).items():
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 12 if name.startswith("norm.") else 0
        assert scale == pytest.approx(0.7 ** (depth - layer)), name


def test_layers_of_a_resnet_are_its_stem_and_its_blocks():
    for name, scale in scale_by_name(timm.create_model("resnet18", num_classes=0), 0.5).items():
        block = re.match(r"layer(\d)\.(\d)\.", name)
        layer = 2 * (int(block[1]) - 1) + int(block[2]) + 1 if block else 0
        assert scale == 0.5 ** (9 - layer), name


def test_layer_decay_is_refused_where_timm_does_not_know_the_layers():
    with pytest.raises(UserError, match=r"optim\.layer_decay.*Sequential.*backbone\.name"):
        layer_lr_scales(network(), 0.75)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_each_parameter_moves_by_the_rate_of_its_layer_and_kind(name):
    """With no momentum from before, the first step of every one of the optimizers is proportional to its rate."""
    slow, fast = network(), network()
    first = [parameter.detach().clone() for parameter in slow.parameters()]
    lr_scales = dict.fromkeys(slow[0].parameters(), 0.25)
    one = build(slow, name, lr=0.1, plain_lr=0.02, lr_scales=lr_scales)
    other = build(fast, name, lr=0.1)
    assert {(group["decay"], round(group["lr_scale"], 9)) for group in one.param_groups} == {
        (True, 0.25),
        (True, 1.0),
        (False, 0.05),
        (False, 0.2),
    }
    data = torch.randn(8, 4, dtype=torch.float64)
    for module, optimizer in ((slow, one), (fast, other)):
        module(data).square().mean().backward()
        optimizer.step()
    expected = [0.25, 0.05, 0.2, 0.2, 1.0, 0.2]
    for start, a, b, factor in zip(first, slow.parameters(), fast.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach() - start, factor * (b.detach() - start), rtol=1e-9, atol=1e-15)


def test_frozen_parameters_stay_out_and_shared_ones_count_once():
    module = network()
    module[0].weight.requires_grad_(False)
    twice = [*module.named_parameters(), ("again", module[2].weight)]
    groups = build_optimizer(twice, name="sgd", lr=1, momentum=0, weight_decay=1, betas=(0, 0)).param_groups
    assert [len(group["params"]) for group in groups] == [1, 4]


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="frozen"):
        build(network().requires_grad_(False), "sgd")


def test_an_unknown_optimizer_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="adamw"):
        build(network(), "adamW")


def lars_by_hand(weights, velocities, grads, lr, momentum, decay, eta=0.001):
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        local = 1.0
        if w.ndim > 1:
            norm, grad_norm = w.square().sum().sqrt(), g.square().sum().sqrt()
            if norm > 0 and grad_norm > 0:
                local = eta * norm / (grad_norm + decay * norm)
            g = g + decay * w
        velocities[i] = momentum * velocities[i] + lr * local * g
        weights[i] = w - velocities[i]


def test_lars_equals_the_paper_in_float64():
    module = network()
    nn.init.zeros_(module[2].weight)  # a weight of norm 0 takes plain steps
    optimizer = build(module, "lars")
    weights = [p.detach().clone() for p in module.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(6):
        lr = 0.1 * (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        module(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        lars_by_hand(weights, velocities, [p.grad for p in module.parameters()], lr, 0.9, 0.05)
        optimizer.step()
        for ours, theirs in zip(module.parameters(), weights, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_it_goes_on_exactly_after_a_round_trip_through_a_file(name):
    def made(module):
        scales = dict.fromkeys(module[0].parameters(), 0.5)
        return build(module, name, lr=0.01, plain_lr=0.002, lr_scales=scales)

    def step(model, opt, seed):
        torch.manual_seed(seed)
        for group in opt.param_groups:
            group["lr"] = 0.01 * seed * group["lr_scale"]
        opt.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        opt.step()

    module = network()
    optimizer = made(module)
    step(module, optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    resumed = made(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    step(module, optimizer, 2)
    step(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    for ours, theirs in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {**ours, "params": None} == {**theirs, "params": None}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_parameter_may_have_its_first_gradient_later_than_the_others(name):
    """DINO's last layer has none in the first epoch; torch's fused SGD fails there."""
    module = network()
    optimizer = build(module, name)
    before = module[2].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        module(torch.ones(2, 4, dtype=torch.float64)).square().mean().backward()
        if step == 0:
            module[2].weight.grad = None
        optimizer.step()
        assert torch.equal(module[2].weight, before) == (step == 0)


def test_fused_adamw_equals_the_paper_in_float64():
    """Loshchilov & Hutter 2019, algorithm 2, with the schedule in the learning rate."""
    module = network()
    optimizer = build(module, "adamw", lr=0.01, weight_decay=0.05)
    assert all(group["fused"] for group in optimizer.param_groups)
    weights = [p.detach().clone() for p in module.parameters()]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, 6):
        optimizer.zero_grad()
        module(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        for i, parameter in enumerate(module.parameters()):
            grad = parameter.grad
            m[i] = 0.9 * m[i] + 0.1 * grad
            v[i] = 0.95 * v[i] + 0.05 * grad**2
            decay = 0.05 if grad.ndim > 1 else 0.0
            step_of = (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.95**step)).sqrt() + 1e-8)
            weights[i] = weights[i] - 0.01 * (step_of + decay * weights[i])
        optimizer.step()
    for ours, theirs in zip(module.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-13)


def test_lars_returns_the_loss_of_a_closure():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Lars([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert weight.sum() < 4.0


def test_lars_refuses_a_negative_rate():
    with pytest.raises(UserError, match="lr >= 0"):
        Lars([nn.Parameter(torch.ones(1))], lr=-1)


@pytest.mark.parametrize("each", [False, True])
def test_gradients_are_clipped_alone_or_together(each):
    torch.manual_seed(0)
    gradients = [torch.randn(3, 5, dtype=torch.float64) * scale for scale in (0.1, 1.0, 100.0, 0.0)]
    gradients.insert(1, None)
    norms = [0.0 if grad is None else grad.square().sum().sqrt().item() for grad in gradients]
    assert l2_norms(gradients).tolist() == pytest.approx(norms)
    total = sum(norm**2 for norm in norms) ** 0.5
    expected = [
        grad if grad is None else grad * min(1.0, 3.0 / ((norm if each else total) + 1e-6))
        for grad, norm in zip(gradients, norms, strict=True)
    ]
    clip_(gradients, l2_norms(gradients), 3.0, each=each)
    for grad, wanted in zip(gradients, expected, strict=True):
        assert (grad is None) == (wanted is None)
        if grad is not None:
            torch.testing.assert_close(grad, wanted)


def test_no_gradient_at_all_has_norm_zero():
    assert l2_norms([None, None]).tolist() == [0.0, 0.0]
    clip_([None], torch.zeros(1), 1.0, each=False)
