"""Losses without negatives against their equations, written in plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses.redundancy import barlow_twins, byol, vicreg

VICREG = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


def mean(values):
    return sum(values) / len(values)


def columns(z):
    """Each dimension as a list of its value for each image, with the mean taken away."""
    found = []
    for d in range(z.shape[1]):
        values = [z[m, d] for m in range(z.shape[0])]
        found.append([value - mean(values) for value in values])
    return found


def barlow_twins_by_the_equation(z1, z2, weight, eps):
    a, b = columns(z1), columns(z2)
    total = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            both = mean([x * y for x, y in zip(a[i], b[j], strict=True)])
            squares = (mean([x * x for x in a[i]]) + eps) * (mean([y * y for y in b[j]]) + eps)
            c = both / torch.sqrt(squares)
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


def vicreg_by_the_equation(z1, z2, invariance, variance, covariance, eps=1e-4):
    images, width = z1.shape
    distance = mean([mean([(z1[m, d] - z2[m, d]) ** 2 for d in range(width)]) for m in range(images)])
    total = invariance * distance
    for z in (z1, z2):
        c = columns(z)
        for i in range(width):
            deviation = torch.sqrt(sum(x * x for x in c[i]) / (images - 1) + eps)
            total = total + variance * torch.relu(1 - deviation) / width / 2
            for j in range(width):
                if i != j:
                    shared = sum(x * y for x, y in zip(c[i], c[j], strict=True)) / (images - 1)
                    total = total + covariance * shared**2 / width
    return total


def byol_by_the_equation(predictions, targets):
    total = 0.0
    for n in range(predictions.shape[1]):
        for q, z in ((predictions[0, n], targets[1, n]), (predictions[1, n], targets[0, n])):
            total = total + ((q / q.norm() - z / z.norm()) ** 2).sum()
    return total / predictions.shape[1]


def same_value_and_gradients(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def two_views(images, width, seed, scale=1.0):
    torch.manual_seed(seed)
    z1 = torch.randn(images, width, dtype=torch.float64) * scale
    z2 = z1 + 0.5 * scale * torch.randn(images, width, dtype=torch.float64) + 3
    return z1.requires_grad_(), z2.requires_grad_()


SIZES = {"images": st.integers(2, 7), "width": st.integers(1, 7), "seed": st.integers(0, 10**6)}


@given(**SIZES, eps=st.sampled_from([0.0, 1e-5]))
@settings(deadline=None, max_examples=20)
def test_barlow_twins_equals_the_equation_for_more_and_for_fewer_images_than_dimensions(images, width, seed, eps):
    z1, z2 = two_views(images, width, seed)
    ours = barlow_twins(z1, z2, off_diagonal_weight=0.3, eps=eps)
    same_value_and_gradients(ours, barlow_twins_by_the_equation(z1, z2, 0.3, eps), z1, z2)


@given(**SIZES, scale=st.sampled_from([0.1, 1.0, 3.0]))
@settings(deadline=None, max_examples=20)
def test_vicreg_equals_the_equation_for_more_and_for_fewer_images_than_dimensions(images, width, seed, scale):
    z1, z2 = two_views(images, width, seed, scale)
    weights = {"invariance": 2.0, "variance": 3.0, "covariance": 5.0}
    same_value_and_gradients(vicreg(z1, z2, **weights), vicreg_by_the_equation(z1, z2, **weights), z1, z2)


@given(images=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_byol_equals_the_equation(images, seed):
    torch.manual_seed(seed)
    predictions = torch.randn(2, images, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(2, images, 4, dtype=torch.float64)
    same_value_and_gradients(byol(predictions, targets), byol_by_the_equation(predictions, targets), predictions)


def test_byol_gives_its_targets_no_gradient():
    z = torch.randn(2, 5, 4, requires_grad=True)
    targets = torch.randn(2, 5, 4, requires_grad=True)
    byol(z, targets).backward()
    assert z.grad.abs().sum() > 0
    assert targets.grad is None


def test_byol_of_parts_averages_to_the_loss_of_the_batch():
    torch.manual_seed(1)
    predictions, targets = torch.randn(2, 2, 8, 4, dtype=torch.float64)
    parts = [byol(predictions[:, f : f + 4], targets[:, f : f + 4]) for f in (0, 4)]
    torch.testing.assert_close(sum(parts) / 2, byol(predictions, targets))


LOSSES = {
    "barlow_twins": lambda z1, z2: barlow_twins(z1, z2, off_diagonal_weight=0.0051),
    "vicreg": lambda z1, z2: vicreg(z1, z2, **VICREG),
    "byol": lambda z1, z2: byol(torch.stack([z1, z2]), torch.stack([z1, z2])),
}


def constant_dimensions(images):
    z = torch.randn(images, 6)
    z[:, ::2] = 7.3
    return z


DEGENERATE = {
    "one image": lambda: torch.randn(1, 6),
    "the same image again and again": lambda: torch.randn(1, 6).repeat(9, 1),
    "the same image again and again, fewer than dimensions": lambda: torch.randn(1, 6).repeat(3, 1),
    "pairs of duplicates": lambda: torch.randn(4, 6).repeat(2, 1),
    "constant dimensions": lambda: constant_dimensions(9),
    "constant dimensions, fewer images": lambda: constant_dimensions(3),
    "all zero": lambda: torch.zeros(4, 6),
    "large": lambda: torch.randn(8, 6) * 1e6,
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_embeddings_have_finite_losses_and_gradients(name, case):
    torch.manual_seed(2)
    z1, z2 = (DEGENERATE[case]().requires_grad_() for _ in range(2))
    loss = LOSSES[name](z1, z2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z1.grad).all()
    assert torch.isfinite(z2.grad).all()


def test_rounding_noise_of_a_constant_dimension_is_no_signal():
    """In float32 a dimension of value 7.3 has deviations of 1e-7 from its mean; scaled to 1 they would correlate."""
    torch.manual_seed(3)
    z = torch.randn(16, 5)
    kept = barlow_twins(z, z, off_diagonal_weight=1.0)
    constant = torch.cat([z, torch.full((16, 1), 7.3)], dim=1)
    torch.testing.assert_close(barlow_twins(constant, constant, off_diagonal_weight=1.0), kept + 1, rtol=1e-5, atol=0)


def test_barlow_twins_does_not_depend_on_scale_or_offset():
    z1, z2 = two_views(9, 5, seed=4)
    moved = barlow_twins(z1 * 40 - 9, z2 * 0.3 + 2, off_diagonal_weight=0.01, eps=0.0)
    torch.testing.assert_close(moved, barlow_twins(z1, z2, off_diagonal_weight=0.01, eps=0.0))


def test_vicreg_pushes_a_narrow_batch_apart():
    torch.manual_seed(5)
    z = (torch.randn(8, 4) * 0.01).requires_grad_()
    vicreg(z, z, invariance=0, variance=25, covariance=0).backward()
    assert (z - z.grad).std() > 5 * z.std()


@pytest.mark.parametrize(("images", "width"), [(64, 24), (24, 64)])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_embeddings_are_compared_in_float32_also_under_autocast(name, images, width):
    torch.manual_seed(6)
    z1, z2 = torch.randn(2, images, width).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = LOSSES[name](z1, z2)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, LOSSES[name](z1.double(), z2.double()).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_nothing_of_width_times_width_is_kept_for_fewer_images_than_dimensions(name):
    z1, z2 = (torch.randn(8, 500, requires_grad=True) for _ in range(2))
    kept = []

    def record(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        LOSSES[name](z1, z2)
    assert max(kept) == 8 * 500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: barlow_twins(torch.ones(4, 3), torch.ones(5, 3), off_diagonal_weight=0.1), "one shape"),
        (lambda: vicreg(torch.ones(4, 3), torch.ones(4, 2), **VICREG), "one shape"),
        (lambda: byol(torch.ones(3, 4, 2), torch.ones(3, 4, 2)), "two views"),
        (lambda: byol(torch.ones(2, 4, 2), torch.ones(2, 5, 2)), "two views"),
    ],
)
def test_embeddings_that_do_not_match_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
