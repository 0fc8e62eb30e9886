"""The losses that learn from one label against their equations, written in plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses import contrastive
from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import sup_con, supervised_minority, supervised_prototypes

SIZES = {"views": st.integers(2, 3), "images": st.integers(1, 5), "seed": st.integers(0, 10**6)}
T = 0.2


def unit_views(z):
    """(view, image, embedding of length 1) of all views of all images."""
    return [(v, n, z[v, n] / z[v, n].norm()) for v in range(len(z)) for n in range(z.shape[1])]


def log_share(anchor, positive, others, temperature):
    """log of exp(a.p / T) / sum_k exp(a.k / T)."""
    denominator = sum(torch.exp(anchor @ key / temperature) for key in others)
    return torch.log(torch.exp(anchor @ positive / temperature) / denominator)


def nt_xent_of(v, n, anchor, flat, temperature):
    """Equation 6 of one anchor; of several other views the mean."""
    others = [key for w, m, key in flat if (w, m) != (v, n)]
    own = [key for w, m, key in flat if m == n and w != v]
    return -sum(log_share(anchor, key, others, temperature) for key in own) / len(own)


def sup_con_of(v, n, anchor, flat, labels, temperature):
    """Equation 7 of one anchor."""
    others = [key for w, m, key in flat if (w, m) != (v, n)]
    alike = [key for w, m, key in flat if (w, m) != (v, n) and (m == n or labels[m] == labels[n])]
    return -sum(log_share(anchor, key, others, temperature) for key in alike) / len(alike)


def sup_con_by_the_equation(z, labels, temperature):
    """Equation 8: the sum over both classes, here over all anchors, and their mean."""
    flat = unit_views(z)
    total = 0.0
    for v, n, anchor in flat:
        if labels[n] == -1:
            total = total + nt_xent_of(v, n, anchor, flat, temperature)
        else:
            total = total + sup_con_of(v, n, anchor, flat, labels, temperature)
    return total / len(flat)


def supervised_minority_by_the_equation(z, labels, minority, temperature):
    """Equation 9."""
    flat = unit_views(z)
    total = 0.0
    for v, n, anchor in flat:
        if labels[n] == minority:
            total = total + sup_con_of(v, n, anchor, flat, labels, temperature)
        else:
            total = total + nt_xent_of(v, n, anchor, flat, temperature)
    return total / len(flat)


def supervised_prototypes_by_the_equation(z, labels, prototypes, temperature, threshold):
    """Equations 10 to 12."""
    flat = unit_views(z)
    total = 0.0
    for v, n, anchor in flat:
        total = total + nt_xent_of(v, n, anchor, flat, temperature)
        if labels[n] == -1:
            continue
        prototype = prototypes[labels[n]] / prototypes[labels[n]].norm()
        if (anchor @ prototype).item() <= threshold:
            others = [key for w, m, key in flat if (w, m) != (v, n)]
            total = total - log_share(anchor, prototype, others, temperature)
    return total / len(flat)


def drawn(views, images, seed):
    """Embeddings that learn, and labels of which some are unknown."""
    torch.manual_seed(seed)
    z = torch.randn(views, images, 4, dtype=torch.float64, requires_grad=True)
    return z, torch.randint(-1, 2, (images,))


def assert_equal_with_gradients(ours, theirs, z):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@given(**SIZES)
@settings(deadline=None, max_examples=20)
def test_sup_con_equals_the_equation(views, images, seed):
    z, labels = drawn(views, images, seed)
    assert_equal_with_gradients(sup_con(z, labels, temperature=T), sup_con_by_the_equation(z, labels.tolist(), T), z)


@given(minority=st.integers(0, 1), **SIZES)
@settings(deadline=None, max_examples=20)
def test_supervised_minority_equals_the_equation(views, images, seed, minority):
    z, labels = drawn(views, images, seed)
    ours = supervised_minority(z, labels, minority=minority, temperature=T)
    assert_equal_with_gradients(ours, supervised_minority_by_the_equation(z, labels.tolist(), minority, T), z)


@given(threshold=st.sampled_from([-1.0, 0.0, 0.5, 1.0]), **SIZES)
@settings(deadline=None, max_examples=20)
def test_supervised_prototypes_equals_the_equation(views, images, seed, threshold):
    z, labels = drawn(views, images, seed)
    prototypes = torch.randn(2, 4, dtype=torch.float64)
    ours = supervised_prototypes(z, labels, prototypes, temperature=T, threshold=threshold)
    theirs = supervised_prototypes_by_the_equation(z, labels.tolist(), prototypes, T, threshold)
    assert_equal_with_gradients(ours, theirs, z)


def minority_of_1(z, labels, temperature=0.07, **share):
    return supervised_minority(z, labels, minority=1, temperature=temperature, **share)


def antipodes(z, labels, temperature=0.07, **share):
    pole = torch.arange(1.0, 1 + z.shape[-1])
    return supervised_prototypes(z, labels, torch.stack([pole, -pole]), temperature=temperature, **share)


def all_pull(z, labels, temperature=0.07, **share):
    return sup_con(z, labels, temperature=temperature, **share)


LOSSES = [all_pull, minority_of_1, antipodes]
EMBEDDINGS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
DEGENERATE = {
    "a single class": (EMBEDDINGS, torch.ones(6, dtype=torch.int64)),
    "one image a class": (EMBEDDINGS[:, :2], torch.tensor([0, 1])),
    "all labels unknown": (EMBEDDINGS, torch.full((6,), -1)),
    "one image": (EMBEDDINGS[:, :1], torch.tensor([1])),
    "huge embeddings": (1e15 * EMBEDDINGS, torch.tensor([0, 1, 1, 0, -1, 0])),
    "tiny embeddings": (1e-20 * EMBEDDINGS, torch.tensor([0, 1, 1, 0, -1, 0])),
    "embeddings of zeros": (0 * EMBEDDINGS, torch.tensor([0, 1, 1, 0, -1, 0])),
    "duplicates": (EMBEDDINGS[:1, :1].expand(3, 4, 8), torch.tensor([0, 1, 1, -1])),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_have_a_finite_loss_and_gradient(case, loss):
    z, labels = DEGENERATE[case]
    z = z.clone().requires_grad_()
    found = loss(z, labels)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_huge_logits_have_a_finite_loss_and_gradient(case, loss):
    """A cosine over a temperature of 1e-4 is 1e4, and exp(1e4) is no number in any precision."""
    z, labels = DEGENERATE[case]
    z = z.clone().requires_grad_()
    found = loss(z, labels, temperature=1e-4)
    (gradient,) = torch.autograd.grad(found, z)
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_images_of_unknown_class_are_pulled_to_their_own_views_alone(loss):
    torch.manual_seed(0)
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(loss(z, torch.full((6,), -1)), nt_xent(z, temperature=0.07))


def test_without_an_image_of_the_minority_the_loss_is_nt_xents():
    torch.manual_seed(0)
    z = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(minority_of_1(z, torch.zeros(6, dtype=torch.int64)), nt_xent(z, temperature=0.07))


def test_in_a_batch_of_one_class_every_view_is_pulled_to_every_other():
    z = EMBEDDINGS.double()
    found = sup_con(z, torch.full((6,), 3), temperature=T)
    torch.testing.assert_close(found, sup_con_by_the_equation(z, [3] * 6, T))
    assert not torch.isclose(found, nt_xent(z, temperature=T))


def test_images_of_unknown_class_are_no_class_of_their_own():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 8, dtype=torch.float64)
    unknown = sup_con(z, torch.tensor([0, 0, -1, -1]), temperature=T)
    apart = sup_con(z, torch.tensor([0, 0, 1, 2]), temperature=T)
    together = sup_con(z, torch.tensor([0, 0, 1, 1]), temperature=T)
    torch.testing.assert_close(unknown, apart)
    assert not torch.isclose(unknown, together)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_part_of_the_global_batch_has_its_share_of_the_loss(loss):
    torch.manual_seed(3)
    z = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, -1, 0, 0, 1, -1])
    whole = loss(z, labels)
    parts = [loss(z[:, first : first + 4], labels, keys_VMD=z, first=first) for first in (0, 4)]
    assert not torch.isclose(*parts)
    assert_equal_with_gradients(sum(parts) / 2, whole, z)


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_anchors_change_nothing(loss, monkeypatch):
    torch.manual_seed(2)
    z = torch.randn(2, 37, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 2, (37,))
    whole = loss(z, labels)
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", 7 * 76)
    assert_equal_with_gradients(loss(z, labels), whole, z)


@pytest.mark.parametrize("loss", LOSSES)
def test_low_precision_embeddings_are_compared_in_float32(loss):
    torch.manual_seed(4)
    z, labels = torch.randn(2, 8, 16).bfloat16(), torch.tensor([0, 1, 1, -1, 0, 0, 1, -1])
    found = loss(z, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(z.float(), labels))


def two_images(cosine):
    """Two views each of two images, the first at a cosine to the first axis, the second at right angles to it."""
    sine = (1 - cosine**2) ** 0.5
    one = torch.tensor([[cosine, sine, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return one.expand(2, 2, 3), torch.tensor([0, -1])


@pytest.mark.parametrize(("cosine", "pulled"), [(-1.0, True), (0.49, True), (0.51, False), (1.0, False)])
def test_an_embedding_near_its_prototype_is_not_pulled(cosine, pulled):
    z, labels = two_images(cosine)
    axis = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    extra = supervised_prototypes(z, labels, axis, temperature=T) - nt_xent(z, temperature=T)
    assert (extra.abs() > 1e-6) == pulled


def test_an_embedding_exactly_at_the_threshold_is_pulled():
    z, labels = two_images(0.0)
    axis = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    found = supervised_prototypes(z, labels, axis, temperature=T, threshold=0.0)
    assert not torch.isclose(found, nt_xent(z, temperature=T))


def test_prototypes_get_no_gradient_and_repel_nothing():
    torch.manual_seed(5)
    z, labels = torch.randn(2, 6, 8, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    prototypes = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert not supervised_prototypes(z, labels, prototypes, temperature=T).requires_grad
    more = torch.cat([prototypes, z[0, :1]])  # a third class without images, on top of an anchor
    torch.testing.assert_close(
        supervised_prototypes(z, labels, more, temperature=T),
        supervised_prototypes(z, labels, prototypes, temperature=T),
    )


def test_a_row_of_zeros_is_no_prototype():
    torch.manual_seed(6)
    z, labels = torch.randn(2, 6, 8, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    found = supervised_prototypes(z, labels, torch.zeros(2, 8), temperature=T)
    torch.testing.assert_close(found, nt_xent(z, temperature=T))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: sup_con(z[:1], y, temperature=0.1), "two views"),
        (lambda z, y: sup_con(z, y, temperature=0.0), "temperature"),
        (lambda z, y: supervised_minority(z[:1], y, minority=0, temperature=0.1), "two views"),
        (lambda z, y: supervised_minority(z, y, minority=0, temperature=-1.0), "temperature"),
        (lambda z, y: supervised_prototypes(z[:1], y, z[0], temperature=0.1), "two views"),
        (lambda z, y: supervised_prototypes(z, y, z[0], temperature=0.0), "temperature"),
        (lambda z, y: supervised_prototypes(z, y, z[0], temperature=0.1, threshold=1.5), "threshold"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 4), torch.tensor([0, 1, 1]))
