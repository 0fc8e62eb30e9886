"""Cross-entropy against its equations, written in plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses.classification import (
    binary_cross_entropy,
    cross_entropy,
    effective_number,
    inverse_frequency,
)

sizes = {"samples": st.integers(1, 6), "classes": st.integers(2, 5), "seed": st.integers(0, 10**6)}
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7])


def focal(p, gamma):
    return -((1 - p) ** gamma) * torch.log(p)


def cross_entropy_by_the_equation(logits, labels, weights, gamma):
    losses = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        p = torch.exp(row[label]) / sum(torch.exp(one) for one in row)
        losses.append(weights[label] * focal(p, gamma) if label >= 0 else 0 * row.sum())
    return torch.stack(losses)


def binary_cross_entropy_by_the_equation(logits, targets, weights, gamma):
    losses = []
    for row, bits in zip(logits, targets.tolist(), strict=True):
        total = 0 * row.sum()
        for x, bit, weight in zip(row, bits, weights, strict=True):
            p = 1 / (1 + torch.exp(-x))
            if bit >= 0:
                total = total + (weight * focal(p, gamma) if bit else focal(1 - p, gamma))
        losses.append(total)
    return torch.stack(losses)


def compare(ours, theirs, logits):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    factors = torch.arange(1, len(ours) + 1, dtype=torch.float64)  # each sample's gradient by itself
    (a,), (b,) = (torch.autograd.grad((losses * factors).sum(), logits) for losses in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(**sizes, gamma=gammas)
@settings(max_examples=20, deadline=None)
def test_cross_entropy_equals_the_equation(samples, classes, seed, gamma):
    torch.manual_seed(seed)
    logits = (3 * torch.randn(samples, classes, dtype=torch.float64)).requires_grad_()
    labels, weights = torch.randint(-1, classes, (samples,)), torch.rand(classes, dtype=torch.float64)
    ours = cross_entropy(logits, labels, class_weights_C=weights, focusing=gamma)
    compare(ours, cross_entropy_by_the_equation(logits, labels, weights, gamma), logits)
    ones = torch.ones(classes, dtype=torch.float64)
    plain = cross_entropy(logits, labels, focusing=gamma)
    compare(plain, cross_entropy_by_the_equation(logits, labels, ones, gamma), logits)


@given(**sizes, gamma=gammas)
@settings(max_examples=20, deadline=None)
def test_binary_cross_entropy_equals_the_equation(samples, classes, seed, gamma):
    torch.manual_seed(seed)
    logits = (3 * torch.randn(samples, classes, dtype=torch.float64)).requires_grad_()
    targets, weights = torch.randint(-1, 2, (samples, classes)), 3 * torch.rand(classes, dtype=torch.float64)
    ours = binary_cross_entropy(logits, targets, positive_weights_C=weights, focusing=gamma)
    compare(ours, binary_cross_entropy_by_the_equation(logits, targets, weights, gamma), logits)
    ones = torch.ones(classes, dtype=torch.float64)
    plain = binary_cross_entropy(logits, targets, focusing=gamma)
    compare(plain, binary_cross_entropy_by_the_equation(logits, targets, ones, gamma), logits)


def test_the_weighted_means_are_those_of_torch():
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(9, 4), torch.randint(-1, 4, (9,)), torch.rand(4)
    assert (labels < 0).any()
    ours = cross_entropy(logits, labels, class_weights_C=weights).sum() / weights[labels[labels >= 0]].sum()
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weight=weights, ignore_index=-1))
    bits = torch.randint(0, 2, (9, 4))
    ours = binary_cross_entropy(logits, bits, positive_weights_C=weights).sum() / bits.numel()
    theirs = F.binary_cross_entropy_with_logits(logits, bits.float(), pos_weight=weights)
    torch.testing.assert_close(ours, theirs)


def test_halves_of_a_batch_average_to_the_whole_with_the_divisor_of_the_global_batch():
    """Halves with means of their own would not: weights and unknown labels differ between them."""
    torch.manual_seed(1)
    logits, weights = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, -1, 0, 1, 2, 2, -1])
    halves = slice(0, 4), slice(4, 8)
    known = labels >= 0
    whole = cross_entropy(logits, labels, class_weights_C=weights).sum() / weights[labels[known]].sum()
    sums = [cross_entropy(logits[half], labels[half], class_weights_C=weights).sum() for half in halves]
    shares = [one / weights[labels[known]].sum() / 0.5 for one in sums]
    torch.testing.assert_close(sum(shares) / 2, whole, rtol=1e-12, atol=0)
    means = [one / weights[labels[half][known[half]]].sum() for one, half in zip(sums, halves, strict=True)]
    assert not torch.isclose(sum(means) / 2, whole, rtol=1e-2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_samples_without_any_known_label_give_zero_and_a_gradient_of_zeros(gamma):
    logits = torch.randn(3, 4, requires_grad=True)
    unknown = torch.full((3,), -1)
    for losses in (
        cross_entropy(logits, unknown, class_weights_C=torch.rand(4), focusing=gamma),
        binary_cross_entropy(logits, unknown[:, None].expand(3, 4), positive_weights_C=torch.rand(4), focusing=gamma),
    ):
        assert torch.equal(losses, torch.zeros(3))
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert torch.equal(gradient, torch.zeros(3, 4))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e3, 1e20, 1e37])
def test_huge_logits_give_finite_losses_and_gradients_and_never_a_focal_one_above_the_plain(gamma, scale):
    logits = (scale * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])).requires_grad_()
    labels = torch.tensor([0, 0, 2])
    for loss, target in ((cross_entropy, labels), (binary_cross_entropy, F.one_hot(labels, 3))):
        losses = loss(logits, target, focusing=gamma)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()
        assert (losses <= loss(logits, target)).all()
        assert losses[1] >= scale  # wrong and sure


def test_a_right_and_sure_sample_has_a_finite_gradient_of_the_focal_loss_in_float32():
    """(1 - p) ** 0.5 has an infinite slope where p rounds to 1."""
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    for loss, target in ((cross_entropy, torch.tensor([0])), (binary_cross_entropy, torch.tensor([[1, 1, 1]]))):
        (gradient,) = torch.autograd.grad(loss(logits, target, focusing=0.5).sum(), logits)
        assert torch.isfinite(gradient).all()


def test_one_class_has_no_loss():
    logits = torch.randn(2, 1, requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        losses = cross_entropy(logits, torch.tensor([0, 0]), focusing=gamma)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert torch.equal(losses, torch.zeros(2))
        assert torch.equal(gradient, torch.zeros(2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_low_precision_are_compared_in_float32(dtype):
    torch.manual_seed(2)
    logits, labels = torch.randn(4, 3).to(dtype), torch.tensor([0, 2, 1, -1])
    low, exact = cross_entropy(logits, labels, focusing=2.0), cross_entropy(logits.double(), labels, focusing=2.0)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-7)
    bits = torch.randint(-1, 2, (4, 3))
    low, exact = (binary_cross_entropy(x, bits, focusing=2.0) for x in (logits, logits.double()))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-7)


@given(counts=st.lists(st.integers(0, 10**6), min_size=2, max_size=6).filter(any), beta=st.floats(0, 0.99999))
@settings(max_examples=20, deadline=None)
def test_weights_of_classes_are_the_papers_and_zero_without_images(counts, beta):
    present = [count for count in counts if count]
    inverse, effective = inverse_frequency(counts), effective_number(counts, beta)
    for count, weight in zip(counts, inverse, strict=True):
        assert weight == (pytest.approx(sum(counts) / (len(present) * count)) if count else 0)
    assert sum(effective) == pytest.approx(len(present))
    raw = [(1 - beta) / (1 - beta**count) if count else 0.0 for count in counts]
    for weight, expected in zip(effective, raw, strict=True):
        assert weight == pytest.approx(expected * len(present) / sum(raw))


def test_the_effective_number_goes_from_no_weights_to_the_inverse_frequency():
    assert effective_number([3, 30, 0], 0.0) == [1.0, 1.0, 0.0]
    few, many = effective_number([3, 30], 1 - 1e-9)
    assert math.isclose(few / many, 10, rel_tol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_a_negative_focusing_is_refused(loss):
    with pytest.raises(ValueError, match="negative"):
        loss(torch.zeros(1, 2), torch.tensor([[0, 1]]), focusing=-1.0)
