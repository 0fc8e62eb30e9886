"""InfoNCE and the relational loss against their equations, written in plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses import contrastive
from medpretrain.losses.instance import info_nce, relational


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def info_nce_by_the_equation(queries, keys, positive, temperature):
    total = 0.0
    for query, place in zip(queries, positive.tolist(), strict=True):
        denominator = sum(torch.exp(cosine(query, key) / temperature) for key in keys)
        total = total - torch.log(torch.exp(cosine(query, keys[place]) / temperature) / denominator)
    return total / len(queries)


def relational_by_the_equation(students, teachers, keys, temperature, teacher_temperature):
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        p = [torch.exp(cosine(teacher, key) / teacher_temperature) for key in keys]
        q = [torch.exp(cosine(student, key) / temperature) for key in keys]
        for k in range(len(keys)):
            total = total - p[k].detach() / sum(p).detach() * torch.log(q[k] / sum(q))
    return total / len(students)


def draw(seed, *sizes, width=4):
    torch.manual_seed(seed)
    return [torch.randn(size, width, dtype=torch.float64, requires_grad=True) for size in sizes]


SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 10**6)


@given(anchors=SIZES, first=SIZES, second=SIZES, seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_info_nce_equals_the_equation(anchors, first, second, seed):
    queries, batch, queue = draw(seed, anchors, first, second)
    positive = torch.randint(first + second, (anchors,))
    ours = info_nce(queries, [batch, queue], positive, temperature=0.2)
    theirs = info_nce_by_the_equation(queries, torch.cat([batch, queue]), positive, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    inputs = [queries, batch, queue]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(anchors=SIZES, keys=SIZES, seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_relational_equals_the_equation(anchors, keys, seed):
    students, teachers, queue = draw(seed, anchors, anchors, keys)
    ours = relational(students, teachers, queue, temperature=0.1, teacher_temperature=0.04)
    theirs = relational_by_the_equation(students, teachers, queue, 0.1, 0.04)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(ours, students), torch.autograd.grad(theirs, students)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_relational_moves_the_student_alone():
    students, teachers, queue = draw(0, 3, 3, 5)
    relational(students, teachers, queue, temperature=0.1, teacher_temperature=0.04).backward()
    assert students.grad.abs().sum() > 0
    assert teachers.grad is None
    assert queue.grad is None


def test_the_relational_loss_of_a_student_like_its_teacher_is_the_entropy_of_the_relation():
    students, keys = draw(1, 4, 9)
    found = relational(students, students, keys, temperature=0.1, teacher_temperature=0.1)
    entropy = sum(
        torch.distributions.Categorical(logits=torch.stack([cosine(s, k) for k in keys]) / 0.1).entropy()
        for s in students
    )
    torch.testing.assert_close(found, entropy / 4)


LOSSES = {
    "info_nce": lambda a, k, t: info_nce(a, k, torch.arange(len(a)) % len(k), temperature=t),
    "relational": lambda a, k, t: relational(a, a.flip(0), k, temperature=t, teacher_temperature=t / 2),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("block", [1, 5 * 13, 7 * 13 + 1])
def test_blocks_of_anchors_change_nothing(loss, block, monkeypatch):
    anchors, keys = draw(2, 31, 13)
    whole = loss(anchors, keys, 0.1)
    (expected,) = torch.autograd.grad(whole, anchors)
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", block)
    parts = loss(anchors, keys, 0.1)
    (found,) = torch.autograd.grad(parts, anchors)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_a_part_of_the_global_batch_has_its_share_of_the_loss():
    students, teachers, keys = draw(3, 8, 8, 8)
    positive = torch.arange(8)
    halves = [slice(0, 4), slice(4, 8)]
    parts = [info_nce(students[half], keys, positive[half], temperature=0.2) for half in halves]
    torch.testing.assert_close(sum(parts) / 2, info_nce(students, keys, positive, temperature=0.2))
    options = {"temperature": 0.1, "teacher_temperature": 0.04}
    parts = [relational(students[half], teachers[half], keys, **options) for half in halves]
    torch.testing.assert_close(sum(parts) / 2, relational(students, teachers, keys, **options))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    ("anchors", "keys", "temperature"),
    [
        (torch.ones(1, 4), torch.ones(1, 4), 0.1),
        (torch.ones(5, 4), torch.ones(5, 4), 0.1),
        (torch.zeros(3, 4), torch.zeros(3, 4), 0.1),
        (1e30 * torch.eye(4), -1e-30 * torch.eye(4), 0.1),
        (torch.eye(4), torch.eye(4), 1e-6),
        (torch.eye(4), torch.eye(4).roll(1, 0), 1e-6),
    ],
    ids=["one image", "duplicates", "zeros", "extreme lengths", "huge logits, right", "huge logits, wrong"],
)
def test_degenerate_embeddings_have_a_finite_loss_and_gradient(loss, anchors, keys, temperature):
    anchors = anchors.clone().requires_grad_()
    value = loss(anchors, keys, temperature)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(anchors.grad).all()


def test_a_lone_key_is_certain():
    queries, keys = draw(4, 3, 1)
    assert info_nce(queries, keys, torch.zeros(3, dtype=torch.int64), temperature=0.2).abs() < 1e-12
    assert relational(queries, queries, keys, temperature=0.2, teacher_temperature=0.1).abs() < 1e-12


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_low_precision_embeddings_are_compared_in_float32(loss):
    anchors, keys = draw(5, 6, 9, width=16)
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(anchors.bfloat16(), keys.bfloat16(), 0.1)
    exact = loss(anchors.bfloat16().double(), keys.bfloat16().double(), 0.1)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: info_nce(x, x, torch.arange(3), temperature=0.0),
        lambda x: relational(x, x, x, temperature=-0.1, teacher_temperature=0.1),
        lambda x: relational(x, x, x, temperature=0.1, teacher_temperature=0.0),
    ],
)
def test_a_temperature_that_is_not_positive_is_refused(call):
    with pytest.raises(ValueError, match="temperature"):
        call(torch.randn(3, 4))
