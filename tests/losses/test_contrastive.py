"""Each loss against its equation, written in plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses import contrastive
from medpretrain.losses.distillation import dino_loss
from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import mul_sup_con, multi_hot


def by_the_equation(z, temperature, weight):
    """The mean over anchors of -1/|P| sum_p w log p, with `weight(n, m)` of images n and m; None: not a positive."""
    views, images, _ = z.shape
    flat = [(v, n, z[v, n] / z[v, n].norm()) for v in range(views) for n in range(images)]
    total = 0.0
    for v, n, anchor in flat:
        others = [(w, m, key) for w, m, key in flat if (w, m) != (v, n)]
        denominator = sum(torch.exp(anchor @ key / temperature) for _, _, key in others)
        positives = [(weight(n, m), key) for _, m, key in others if weight(n, m) is not None]
        log_p = [w * torch.log(torch.exp(anchor @ key / temperature) / denominator) for w, key in positives]
        total = total - sum(log_p) / len(log_p)
    return total / len(flat)


def nt_xent_by_the_equation(z, temperature):
    return by_the_equation(z, temperature, lambda n, m: 1.0 if m == n else None)


def mul_sup_con_by_the_equation(z, labels, temperature, threshold):
    bits = [set(row.nonzero().flatten().tolist()) for row in labels]

    def jaccard(n, m):
        if m == n:
            return 1.0
        similarity = len(bits[n] & bits[m]) / len(bits[n] | bits[m]) if bits[n] | bits[m] else 0.0
        return similarity if similarity >= threshold - 1e-6 else None

    return by_the_equation(z, temperature, jaccard)


@given(views=st.integers(2, 3), images=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_nt_xent_equals_the_equation(views, images, seed):
    torch.manual_seed(seed)
    z = torch.randn(views, images, 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = nt_xent(z, temperature=0.2), nt_xent_by_the_equation(z, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if images > 1:
        (a,), (b,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(images=st.integers(1, 6), seed=st.integers(0, 10**6), threshold=st.sampled_from([0.3, 1 / 3, 0.34, 0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_mul_sup_con_equals_the_equation(images, seed, threshold):
    torch.manual_seed(seed)
    z = torch.randn(2, images, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (images, 5))
    ours = mul_sup_con(z, labels, temperature=0.07, threshold=threshold)
    theirs = mul_sup_con_by_the_equation(z, labels, 0.07, threshold)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if images > 1:
        (a,), (b,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_images_without_labels_have_the_finite_loss_of_nt_xent():
    torch.manual_seed(0)
    z = torch.randn(2, 6, 8, requires_grad=True)
    loss = mul_sup_con(z, torch.zeros(6, 4), temperature=0.07, threshold=0.3)
    torch.testing.assert_close(loss, nt_xent(z, temperature=0.07))
    loss.backward()
    assert torch.isfinite(z.grad).all()


def test_half_matches_count_at_the_papers_threshold_and_not_above_a_third():
    torch.manual_seed(1)
    z = torch.randn(2, 2, 8, dtype=torch.float64)
    same_modality = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]])
    half, exact = (mul_sup_con(z, same_modality, temperature=0.07, threshold=t) for t in (0.3, 0.34))
    torch.testing.assert_close(exact, nt_xent(z, temperature=0.07))
    assert not torch.isclose(half, exact)


def test_blocks_of_anchors_change_nothing(monkeypatch):
    torch.manual_seed(2)
    z = torch.randn(2, 37, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (37, 6))
    whole = mul_sup_con(z, labels, temperature=0.07, threshold=0.3)
    (expected,) = torch.autograd.grad(whole, z)
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", 7 * 74)
    blocks = mul_sup_con(z, labels, temperature=0.07, threshold=0.3)
    (found,) = torch.autograd.grad(blocks, z)
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_a_part_of_the_global_batch_has_its_share_of_the_loss():
    torch.manual_seed(3)
    z = torch.randn(2, 8, 4, dtype=torch.float64)
    labels = torch.randint(0, 2, (8, 5))
    parts = [mul_sup_con(z[:, f : f + 4], labels, temperature=0.07, threshold=0.3, keys_VMD=z, first=f) for f in (0, 4)]
    torch.testing.assert_close(sum(parts) / 2, mul_sup_con(z, labels, temperature=0.07, threshold=0.3))


def test_low_precision_embeddings_are_compared_in_float32():
    torch.manual_seed(4)
    z = torch.randn(2, 8, 16)
    assert nt_xent(z.bfloat16(), temperature=0.1).dtype == torch.float32


def test_unknown_labels_set_no_bit():
    assert multi_hot([torch.tensor([-1]), torch.tensor([-1])], [3, 2]).sum() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: nt_xent(z[:1], temperature=0.1), "two views"),
        (lambda z: nt_xent(z, temperature=0.0), "temperature"),
        (lambda z: mul_sup_con(z, torch.ones(3, 2), temperature=0.1, threshold=0.0), "threshold"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 4))


def dino_by_the_equation(student, teacher, center, student_temperature, teacher_temperature):
    total, pairs = 0.0, 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s == t:
                continue
            pairs += 1
            for n in range(student.shape[1]):
                target = torch.softmax((teacher[t, n] - center) / teacher_temperature, dim=0)
                total = total - (target * torch.log_softmax(student[s, n] / student_temperature, dim=0)).sum()
    return total / pairs / student.shape[1]


@given(local=st.integers(0, 4), images=st.integers(1, 4), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_dino_equals_the_equation(local, images, seed):
    torch.manual_seed(seed)
    student = torch.randn(2 + local, images, 7, dtype=torch.float64, requires_grad=True)
    teacher, center = torch.randn(2, images, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    ours = dino_loss(student, teacher, center, student_temperature=0.1, teacher_temperature=0.04)
    theirs = dino_by_the_equation(student, teacher, center, 0.1, 0.04)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_dino_is_computed_in_float32_from_low_precision_logits():
    torch.manual_seed(5)
    student, teacher = torch.randn(4, 3, 9).bfloat16(), torch.randn(2, 3, 9).bfloat16()
    low = dino_loss(student, teacher, torch.zeros(9), student_temperature=0.1, teacher_temperature=0.04)
    exact = dino_by_the_equation(student.double(), teacher.double(), torch.zeros(9).double(), 0.1, 0.04)
    assert low.dtype == torch.float32
    assert math.isclose(low.item(), exact.item(), rel_tol=1e-5)


DEGENERATE = {
    "one image": [[1, 0]],
    "a single class": [[1, 0]] * 4,
    "one image a class": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no labels": [[0, 0]] * 4,
}


@pytest.mark.parametrize("labels", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1e-5])  # logits of 14, and of 100,000
def test_degenerate_batches_have_finite_losses_and_gradients(labels, duplicated, temperature):
    torch.manual_seed(6)
    images = len(labels)
    z = torch.randn(2, 1 if duplicated else images, 5).expand(2, images, 5).clone().requires_grad_()
    losses = [
        nt_xent(z, temperature=temperature),
        mul_sup_con(z, torch.tensor(labels), temperature=temperature, threshold=0.3),
        dino_loss(z, z.flip(0), torch.zeros(5), student_temperature=temperature, teacher_temperature=temperature / 2),
    ]
    for loss in losses:
        assert math.isfinite(loss.item())
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
