import copy
import io

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from medpretrain.training.optimizers import Lars, build_optimizer, clip_per_parameter_


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def build(module, name, lr=0.1, weight_decay=0.05):
    return build_optimizer(
        module.named_parameters(), name=name, lr=lr, momentum=0.9, weight_decay=weight_decay, betas=(0.9, 0.95)
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


def test_lars_goes_on_exactly_after_a_round_trip_through_a_file():
    module = network()
    optimizer = build(module, "lars")

    def step(model, opt, seed):
        torch.manual_seed(seed)
        opt.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        opt.step()

    step(module, optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    resumed = build(other, "lars")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    step(module, optimizer, 2)
    step(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


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


def test_clip_acts_on_each_parameter_alone():
    torch.manual_seed(0)
    scales = [0.1, 1.0, 100.0, 0.0]
    parameters = [nn.Parameter(torch.zeros(3, 5, dtype=torch.float64)) for _ in scales]
    parameters.append(nn.Parameter(torch.zeros(7)))  # another dtype, clipped in the same call
    parameters.append(nn.Parameter(torch.zeros(1)))  # no gradient
    for parameter, scale in zip(parameters, [*scales, 50.0], strict=False):
        parameter.grad = torch.randn_like(parameter) * scale
    expected = []
    for parameter in parameters[:-1]:
        norm = parameter.grad.square().sum().sqrt()
        expected.append(parameter.grad * min(1.0, 3.0 / (norm.item() + 1e-6)))
    largest = max(p.grad.norm().item() for p in parameters[:-1])
    assert clip_per_parameter_(parameters, 3.0).item() == pytest.approx(largest)
    for parameter, grad in zip(parameters, expected, strict=False):
        torch.testing.assert_close(parameter.grad, grad)
    assert parameters[-1].grad is None


def test_clip_of_nothing_is_zero_and_a_bad_norm_is_refused():
    assert clip_per_parameter_([nn.Parameter(torch.zeros(1))], 1.0).item() == 0.0
    with pytest.raises(UserError, match="above 0"):
        clip_per_parameter_([], 0.0)
