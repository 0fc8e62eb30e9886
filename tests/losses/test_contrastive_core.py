"""The core of all contrastive losses against its equation in plain loops, with whatever a rule may ask of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from medpretrain.losses import contrastive
from medpretrain.losses.contrastive import Pairs, contrastive_loss
from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import mul_sup_con, sup_con


def by_the_equation(anchors, keys, weight, temperature, own=None, log_share=None, logits=None):
    """Anchor by anchor, key by key; weight[a][k], log_share[a][k], temperature[a], own[a]; D(a) leaves own[a] out."""
    total = 0.0
    for a in range(len(anchors)):
        anchor = anchors[a] / anchors[a].norm()
        s = [anchor @ (key / key.norm()) / temperature[a] for key in keys]
        s += [] if logits is None else list(logits[a])
        others = [k for k in range(len(s)) if own is None or k != own[a]]
        shares = [0.0 if log_share is None else log_share[a][k].item() for k in range(len(s))]
        denominator = [math.exp(shares[k]) * torch.exp(s[k]) for k in others if shares[k] > -math.inf]
        log_denominator = torch.log(sum(denominator)) if denominator else 0.0
        for k in others:
            total = total - weight[a][k].item() * (s[k] - log_denominator)
    return total / len(anchors)


def double(*size, learns=True):
    return torch.randn(*size, dtype=torch.float64, requires_grad=learns)


def dense(weight, log_share=None):
    share = (lambda rows: None) if log_share is None else lambda rows: log_share[rows]
    return lambda rows: Pairs(weight[rows], log_share=share(rows))


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(ours, inputs)
    expected = torch.autograd.grad(theirs, inputs, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_the_equation(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    learns = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    parts = [double(draw(st.integers(1, 4)), 3, learns=learn) for learn in learns]
    anchors, classes = double(draw(st.integers(1, 5)), 3), draw(st.integers(0, 3))
    logits = double(len(anchors), classes) if classes else None
    places = sum(map(len, parts))
    shape = len(anchors), places + classes
    temperature = draw(st.sampled_from([0.2, torch.rand(len(anchors), dtype=torch.float64) + 0.1]))
    own = torch.randint(places, (len(anchors),)) if draw(st.booleans()) else None
    share = torch.randn(shape, dtype=torch.float64) if draw(st.booleans()) else None
    if share is not None:
        share[torch.rand(shape) < 0.3] = -torch.inf
    weight = torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) < 0.6)
    if draw(st.booleans()):
        # A key may stand twice among the sparse positives: both count.
        key = torch.randint(shape[1], (len(anchors), draw(st.integers(1, 3))))
        chosen = torch.rand(key.shape, dtype=torch.float64)
        weight = torch.zeros(shape, dtype=torch.float64).scatter_add(1, key, chosen)
    else:
        key, chosen = None, weight

    def rule(rows):
        return Pairs(chosen[rows], None if key is None else key[rows], None if share is None else share[rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "_BLOCK_ELEMENTS", draw(st.sampled_from([1, 2 * shape[1], 1 << 22])))
        ours = contrastive_loss(anchors, parts, rule, temperature=temperature, own_A=own, logits_AC=logits)
    each = temperature if isinstance(temperature, torch.Tensor) else [temperature] * len(anchors)
    theirs = by_the_equation(anchors, torch.cat(parts), weight, each, own, share, logits)
    if ours.requires_grad and isinstance(theirs, torch.Tensor) and theirs.requires_grad:
        inputs = [anchors, *(part for part in parts if part.requires_grad)] + ([] if logits is None else [logits])
        assert_same(ours, theirs, inputs)
    else:  # the only key is the anchor itself
        assert ours.item() == 0


def test_a_learned_temperature_of_each_anchor_has_its_gradient():
    torch.manual_seed(0)
    anchors, keys, weight = double(4, 3), double(5, 3), torch.rand(4, 5)
    raw = double(4)
    ours = contrastive_loss(anchors, keys, dense(weight), temperature=raw.exp())
    assert_same(ours, by_the_equation(anchors, keys, weight, raw.exp()), [anchors, keys, raw])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (3, 1), (3, 5)])
def test_a_log_share_of_any_shape_is_broadcast(shape):
    torch.manual_seed(1)
    anchors, keys, weight, share = double(3, 4), double(5, 4), torch.rand(3, 5), torch.randn(shape)
    ours = contrastive_loss(anchors, keys, lambda rows: Pairs(weight[rows], log_share=share), temperature=0.3)
    theirs = by_the_equation(anchors, keys, weight, [0.3] * 3, log_share=share.expand(3, 5))
    assert_same(ours, theirs, [anchors, keys])


def test_a_rule_keeps_what_it_handed_over():
    """Blocks are worked on in place; the tensors of the rule are not ours to write in."""
    torch.manual_seed(2)
    anchors, keys, weight, share = double(3, 4), double(5, 4), torch.rand(3, 5).double(), torch.randn(3, 5).double()
    logits, own = double(3, 0), torch.tensor([0, 1, 2])
    before = [x.clone() for x in (anchors, keys, weight, share)]
    contrastive_loss(anchors, keys, dense(weight, share), temperature=0.3, own_A=own, logits_AC=logits).backward()
    for x, y in zip((anchors, keys, weight, share), before, strict=True):
        assert torch.equal(x, y)


def test_anchors_without_positives_add_nothing_and_pull_nothing():
    torch.manual_seed(3)
    anchors, keys, weight = double(4, 3), double(5, 3), torch.rand(4, 5).double()
    weight[1:3] = 0
    loss = contrastive_loss(anchors, keys, dense(weight), temperature=0.1)
    rest = contrastive_loss(anchors[[0, 3]], keys, dense(weight[[0, 3]]), temperature=0.1)
    torch.testing.assert_close(loss * 4, rest * 2)
    loss.backward()
    assert torch.equal(anchors.grad[1:3], torch.zeros(2, 3, dtype=torch.float64))
    assert keys.grad.any()


@pytest.mark.parametrize("sparse", [False, True])
def test_an_empty_denominator_pulls_and_does_not_repel(sparse):
    torch.manual_seed(4)
    anchors, keys, share = double(2, 3), double(4, 3), torch.full((4,), -torch.inf)
    weight = torch.eye(2, 4)
    key = torch.tensor([[0], [1]])
    pairs = (lambda r: Pairs(torch.ones(2, 1)[r], key[r], share)) if sparse else lambda r: Pairs(weight[r], None, share)
    ours = contrastive_loss(anchors, keys, pairs, temperature=0.5)
    theirs = by_the_equation(anchors, keys, weight, [0.5] * 2, log_share=share.expand(2, 4))
    assert_same(ours, theirs, [anchors, keys])


@pytest.mark.parametrize("given_to_itself", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("sparse", [False, True])
def test_what_a_rule_gives_an_anchor_with_itself_is_ignored(sparse, given_to_itself):
    torch.manual_seed(5)
    z, own = double(4, 3), torch.arange(4)
    weight = torch.rand(4, 4).double()
    weight[own, own] = given_to_itself
    key = torch.stack([own, (own + 1) % 4], dim=1)
    chosen = weight.gather(1, key)
    rule = (lambda rows: Pairs(chosen[rows], key[rows])) if sparse else dense(weight)
    ours = contrastive_loss(z, z, rule, temperature=0.2, own_A=own)
    counted = torch.zeros(4, 4).double().scatter(1, key, chosen) if sparse else weight
    assert_same(ours, by_the_equation(z, z, counted, [0.2] * 4, own=own), [z])


def test_one_tensor_as_anchors_and_keys_has_the_gradient_of_both():
    torch.manual_seed(6)
    z, weight, own = double(4, 3), torch.rand(4, 4), torch.arange(4)
    same = contrastive_loss(z, z, dense(weight), temperature=0.2, own_A=own)
    apart = contrastive_loss(z, z.clone(), dense(weight), temperature=0.2, own_A=own)
    assert_same(same, apart, [z])


def test_keys_without_gradient_get_none_and_change_no_other():
    torch.manual_seed(7)
    anchors, batch, queue, weight = double(3, 4), double(3, 4), double(6, 4, learns=False), torch.rand(3, 9)
    both = contrastive_loss(anchors, [batch, queue], dense(weight), temperature=0.2)
    one = contrastive_loss(anchors, torch.cat([batch, queue]), dense(weight), temperature=0.2)
    assert_same(both, one, [anchors, batch])
    assert queue.grad is None


def test_only_keys_or_only_logits_may_learn():
    torch.manual_seed(8)
    anchors, keys, logits, weight = double(3, 4, learns=False), double(5, 4), double(3, 2), torch.rand(3, 7)
    for learning in (keys, logits):
        keys.requires_grad_(learning is keys)
        logits.requires_grad_(learning is logits)
        ours = contrastive_loss(anchors, keys, dense(weight), temperature=0.2, logits_AC=logits)
        assert_same(ours, by_the_equation(anchors, keys, weight, [0.2] * 3, logits=logits), [learning])


def test_the_value_is_the_same_without_gradients():
    torch.manual_seed(9)
    z = double(2, 6, 3)
    expected = nt_xent(z, temperature=0.2)
    with torch.no_grad():
        quiet = nt_xent(z, temperature=0.2)
    assert not quiet.requires_grad
    assert torch.equal(quiet, expected)
    assert torch.equal(nt_xent(z.detach(), temperature=0.2), expected)


def test_under_autocast_rounded_embeddings_are_contrasted_in_float32():
    torch.manual_seed(10)
    x, projector = torch.randn(2, 16, 8), torch.nn.Linear(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        z = projector(x)
        loss = nt_xent(z, temperature=0.07)
        of_float = nt_xent(z.float(), temperature=0.07)
    assert z.dtype == torch.bfloat16
    expected = nt_xent(z.detach().double(), temperature=0.07).item()
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)
    assert math.isclose(of_float.item(), expected, rel_tol=1e-6)
    (grad,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    nt_xent(exact, temperature=0.07).backward()
    torch.testing.assert_close(grad, exact.grad.bfloat16(), rtol=1e-2, atol=1e-7)


def test_a_rule_computes_in_float32_under_autocast_too():
    seen = []

    def rule(rows):
        weight = torch.ones(3, 2)[rows] @ torch.ones(2, 4)
        seen.append(weight.dtype)
        return Pairs(weight)

    with torch.autocast("cpu", torch.bfloat16):
        contrastive_loss(torch.randn(3, 5), torch.randn(4, 5), rule, temperature=0.2)
    assert seen == [torch.float32]


def test_the_upstream_gradient_scales_all_gradients():
    torch.manual_seed(11)
    z = double(2, 5, 3)
    (once,) = torch.autograd.grad(nt_xent(z, temperature=0.2), z)
    (scaled,) = torch.autograd.grad(nt_xent(z, temperature=0.2) * -3, z)
    torch.testing.assert_close(scaled, once * -3)


def test_the_gradient_by_hand_passes_gradcheck(monkeypatch):
    torch.manual_seed(12)
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", 2 * 9)
    weight, share, own = torch.rand(4, 9), torch.randn(4, 9), torch.tensor([0, 3, 1, 2])

    def loss(anchors, batch, queue, logits, raw):
        rule = dense(weight, share)
        return contrastive_loss(anchors, [batch, queue], rule, temperature=raw.exp(), own_A=own, logits_AC=logits)

    assert torch.autograd.gradcheck(loss, (double(4, 3), double(4, 3), double(3, 3), double(4, 2), double(4)))


def test_huge_logits_stay_finite_in_float32():
    torch.manual_seed(13)
    anchors, keys, logits = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.randn(3, 2) * 1e4
    loss = contrastive_loss(anchors, keys, dense(torch.rand(3, 7)), temperature=1e-3, logits_AC=logits)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(anchors.grad).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_it_runs_where_only_deterministic_algorithms_may(sparse):
    """Memory that nothing has written is NaN there, so the result is also that of no such memory."""
    torch.manual_seed(14)
    z, labels = double(2, 6, 3), torch.arange(6) // 2

    def loss():
        return nt_xent(z, temperature=0.2) if sparse else sup_con(z, labels, temperature=0.2)

    (expected,) = torch.autograd.grad(loss(), z)
    torch.use_deterministic_algorithms(True)
    try:
        (found,) = torch.autograd.grad(loss(), z)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


def full_matrix(z):
    keys = F.normalize(z.flatten(0, 1), dim=1)
    return torch.logsumexp(keys @ keys.T, dim=1).mean()


LABELS = torch.arange(150) % 7


@pytest.mark.parametrize(
    ("loss", "grows"),
    [
        (full_matrix, True),
        (lambda z: nt_xent(z, temperature=0.1), False),
        (lambda z: sup_con(z, LABELS, temperature=0.1), False),
        (lambda z: mul_sup_con(z, F.one_hot(LABELS), temperature=0.1, threshold=0.3), False),
    ],
)
def test_no_tensor_of_all_anchors_and_all_keys_is_made(loss, grows, monkeypatch):
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", 3000)
    z = torch.randn(2, 150, 8, requires_grad=True)
    with Largest() as largest:
        loss(z).backward()
    # A block of the labels' int64 or the embeddings, whichever is larger; not 300 x 300 logits.
    assert (largest.bytes > 8 * 3000) == grows
    assert z.grad.any()
