"""The losses for long tails against their equations, written in plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses import contrastive
from medpretrain.losses.balanced import (
    balanced_contrastive,
    parametric_contrastive,
    subclass_contrastive,
)
from medpretrain.losses.classification import cross_entropy, share_of_the_mean
from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import sup_con

CLASSES = 3


def unit(x):
    return x / x.norm()


def keys_of(z):
    """(view, image, unit embedding) of every view."""
    views, images, _ = z.shape
    return [(v, n, unit(z[v, n])) for v in range(views) for n in range(images)]


def mean_log_softmax(positives, denominator):
    return sum(logit - torch.log(denominator) for logit in positives) / len(positives)


def balanced_by_the_equation(z, labels, prototypes, temperature):
    images = z.shape[1]
    classes = [y if y >= 0 else CLASSES + n for n, y in enumerate(labels.tolist())]
    keys = [(v, n, classes[n], key) for v, n, key in keys_of(z)]
    keys += [(None, None, c, unit(prototypes[c])) for c in range(CLASSES)]
    total, anchors = 0.0, keys_of(z)
    for v, n, anchor in anchors:
        others = [(c, anchor @ key / temperature) for w, m, c, key in keys if (w, m) != (v, n)]
        denominator = 0.0
        for c in range(CLASSES + images):
            of_class = [torch.exp(logit) for other, logit in others if other == c]
            if of_class:
                denominator = denominator + sum(of_class) / len(of_class)
        positives = [logit for other, logit in others if other == classes[n]]
        total = total - mean_log_softmax(positives, denominator)
    return total / len(anchors)


def parametric_by_the_equation(query, keys, logits, labels, labels_of_keys, own, temperature, alpha, beta):
    total = 0.0
    for n in range(len(query)):
        s = [unit(query[n]) @ unit(key) / temperature for key in keys]
        denominator = sum(torch.exp(x) for x in s) + sum(torch.exp(x) for x in logits[n])
        terms, weights = [], []
        for k in range(len(keys)):
            if k == own[n] or (labels[n] >= 0 and labels[n] == labels_of_keys[k]):
                terms.append(alpha * (s[k] - torch.log(denominator)))
                weights.append(alpha)
        if labels[n] >= 0:
            terms.append(beta * (logits[n, labels[n]] - torch.log(denominator)))
            weights.append(beta)
        total = total - sum(terms) / sum(weights)
    return total / len(query)


def subclass_by_the_equation(z, labels, subclasses, temperature, beta, class_temperature):
    """Equation 4: M~ and P~ hold the other views of the anchor's own image, M does not."""
    total, keys = 0.0, keys_of(z)
    for a, (v, n, anchor) in enumerate(keys):
        all_but = [(w, m, key) for w, m, key in keys if (w, m) != (v, n)]
        own = {(w, m) for w, m, _ in all_but if m == n}
        m_set = {(w, m) for w, m, _ in all_but if m != n and subclasses[m] == subclasses[n] >= 0}
        p_set = {(w, m) for w, m, _ in all_but if m != n and labels[m] == labels[n] >= 0}
        s = {(w, m): anchor @ key / temperature for w, m, key in all_but}
        first = mean_log_softmax([s[p] for p in own | m_set], sum(torch.exp(x) for x in s.values()))
        warm = class_temperature if isinstance(class_temperature, float) else class_temperature[a]
        s = {(w, m): anchor @ key / warm for w, m, key in all_but if (w, m) not in m_set}
        positives = [s[p] for p in (own | p_set) - m_set]
        assert len(positives) == len(own | p_set) - len(m_set)
        total = total - first - beta * mean_log_softmax(positives, sum(torch.exp(x) for x in s.values()))
    return total / len(keys)


def same_value_and_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@given(views=st.integers(2, 3), images=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_balanced_contrast_equals_the_equation(views, images, seed):
    torch.manual_seed(seed)
    z, prototypes = random(views, images, 4), random(CLASSES, 4)
    labels = torch.randint(-1, CLASSES, (images,))
    ours = balanced_contrastive(z, labels, prototypes, temperature=0.1)
    theirs = balanced_by_the_equation(z, labels, prototypes, 0.1)
    same_value_and_gradients(ours, theirs, (z, prototypes))


@given(images=st.integers(1, 6), queue=st.integers(0, 5), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_parametric_contrast_equals_the_equation(images, queue, seed):
    torch.manual_seed(seed)
    query, keys, old, logits = random(images, 4), random(images, 4), random(queue, 4), random(images, CLASSES)
    labels = torch.randint(-1, CLASSES, (images,))
    labels_of_keys = torch.cat([labels, torch.randint(-1, CLASSES, (queue,))])
    own = torch.arange(images)
    options = {"temperature": 0.2, "key_weight": 0.05, "centre_weight": 1.0}
    ours = parametric_contrastive(query, [keys, old], logits, labels, labels_of_keys, own, **options)
    theirs = parametric_by_the_equation(
        query, [*keys, *old], logits, labels.tolist(), labels_of_keys.tolist(), own.tolist(), 0.2, 0.05, 1.0
    )
    same_value_and_gradients(ours, theirs, (query, keys, logits))


@given(
    views=st.integers(2, 3),
    images=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    each=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_the_contrast_of_sub_classes_equals_the_equation(views, images, seed, each):
    torch.manual_seed(seed)
    z = random(views, images, 4)
    labels = torch.randint(-1, 2, (images,))
    subclasses = torch.where(labels < 0, -1, 2 * labels + torch.randint(0, 2, (images,)))
    second = torch.rand(views * images, dtype=torch.float64) + 0.1 if each else 0.3
    ours = subclass_contrastive(z, labels, subclasses, temperature=0.1, class_weight=0.25, class_temperature=second)
    theirs = subclass_by_the_equation(z, labels.tolist(), subclasses.tolist(), 0.1, 0.25, second)
    same_value_and_gradients(ours, theirs, (z,))


def test_a_part_of_the_global_batch_has_its_share_of_the_loss():
    torch.manual_seed(1)
    z, prototypes = torch.randn(2, 8, 4, dtype=torch.float64), torch.randn(CLASSES, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, -1, 2, 0, 1, -1])
    subclasses = torch.tensor([0, 1, 2, -1, 3, 0, 2, -1])
    losses = {
        "balanced": lambda part, **rest: balanced_contrastive(part, labels, prototypes, temperature=0.1, **rest),
        "sub-classes": lambda part, **rest: subclass_contrastive(part, labels, subclasses, temperature=0.1, **rest),
    }
    for name, loss in losses.items():
        parts = [loss(z[:, first : first + 4], keys_VMD=z, first=first) for first in (0, 4)]
        torch.testing.assert_close(sum(parts) / 2, loss(z), msg=lambda text, name=name: f"{name}: {text}")


def test_blocks_of_anchors_change_nothing(monkeypatch):
    torch.manual_seed(2)
    z, prototypes, labels = random(2, 23, 8), random(CLASSES, 8), torch.randint(-1, CLASSES, (23,))
    query, logits, own = random(23, 8), random(23, CLASSES), torch.arange(23)

    def losses():
        return (
            balanced_contrastive(z, labels, prototypes, temperature=0.1)
            + subclass_contrastive(z, labels, labels, temperature=0.1, class_temperature=torch.linspace(0.1, 1, 46))
            + parametric_contrastive(query, [z[0]], logits, labels, labels, own, temperature=0.2)
        )

    inputs = (z, prototypes, query, logits)
    whole = losses()
    expected = torch.autograd.grad(whole, inputs)
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", 7 * 50)
    blocks = losses()
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(blocks, inputs), expected, rtol=1e-10, atol=1e-14)


def test_one_class_among_prototypes_weighs_as_much_as_any_other():
    """A class seen a hundred times has the pull on the denominator of a class seen once."""
    few, many = torch.tensor([0, 1]), torch.tensor([0] + [1] * 100)
    z = torch.tensor([[1.0, 0], [0, 1.0]])
    losses = [balanced_contrastive(z[y].repeat(2, 1, 1), y, z, temperature=0.5) for y in (few, many)]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.isclose(*(sup_con(z[y].repeat(2, 1, 1), y, temperature=0.5) for y in (few, many)))


def test_without_labels_what_is_left_is_a_contrast_of_images():
    torch.manual_seed(3)
    z, unknown = torch.randn(2, 5, 4, dtype=torch.float64), torch.full((5,), -1)
    images = nt_xent(z, temperature=0.1)
    torch.testing.assert_close(
        subclass_contrastive(z, unknown, unknown, temperature=0.1, class_weight=0.25), 1.25 * images
    )
    torch.testing.assert_close(
        subclass_contrastive(z, unknown, unknown, temperature=0.1, class_weight=0.0), images, rtol=1e-12, atol=0
    )


def test_classes_without_sub_classes_and_without_the_class_term_are_sup_con():
    torch.manual_seed(4)
    z, labels = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, -1])
    found = subclass_contrastive(z, labels, labels, temperature=0.1, class_weight=torch.tensor(0.0))
    torch.testing.assert_close(found, sup_con(z, labels, temperature=0.1), rtol=1e-6, atol=1e-7)


DEGENERATE = {
    "one image": (1, [0]),
    "one class": (4, [1, 1, 1, 1]),
    "an image a class": (3, [0, 1, 2]),
    "nothing known": (4, [-1, -1, -1, -1]),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("alike", [False, True])
def test_degenerate_batches_are_finite(case, alike):
    torch.manual_seed(5)
    images, ids = DEGENERATE[case]
    labels = torch.tensor(ids)
    z = (torch.ones(2, images, 4) if alike else torch.randn(2, images, 4)).requires_grad_()
    prototypes = torch.zeros(CLASSES, 4, requires_grad=True)
    logits = (1e4 * torch.randn(images, CLASSES)).requires_grad_()
    prior = torch.tensor([1e-7, 0.5, 0.5]).log()
    total = (
        balanced_contrastive(z, labels, prototypes, temperature=0.07)
        + subclass_contrastive(z, labels, labels, temperature=0.07)
        + parametric_contrastive(z[0], [z[1]], logits, labels, labels, torch.arange(images), temperature=0.2)
        + share_of_the_mean(cross_entropy(logits + prior, labels), (labels >= 0).sum(), 1.0)
    )
    assert math.isfinite(total.item())
    for gradient in torch.autograd.grad(total, (z, prototypes, logits)):
        assert torch.isfinite(gradient).all()


def test_low_precision_is_widened():
    torch.manual_seed(6)
    z, labels = torch.randn(2, 4, 8).bfloat16(), torch.tensor([0, 0, 1, -1])
    logits = torch.randn(4, CLASSES).bfloat16()
    losses = [
        balanced_contrastive(z, labels, torch.randn(CLASSES, 8), temperature=0.1),
        subclass_contrastive(z, labels, labels, temperature=0.1),
        parametric_contrastive(z[0], [z[1]], logits, labels, labels, torch.arange(4), temperature=0.2),
        cross_entropy(logits, labels).sum(),
    ]
    assert {loss.dtype for loss in losses} == {torch.float32}


def test_what_has_no_meaning_is_refused():
    z, labels = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="two views"):
        balanced_contrastive(z[:1], labels, torch.randn(CLASSES, 4), temperature=0.1)
    with pytest.raises(ValueError, match="temperature"):
        subclass_contrastive(z, labels, labels, temperature=0.1, class_temperature=0.0)
