"""KCL and TSC against their equations in plain loops, the sampling of positives, and the places of targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.losses import contrastive
from medpretrain.losses.k_positive import Targets, kcl, match, sample_positives, uniform_targets


def by_the_equation(queries, keys, own, positives, temperature, targets=(), labels=(), weight=0.0):
    """`positives[a]`: the sampled places, a list; `labels[a]`: the place among the targets, or -1."""
    keys = [key / key.norm() for key in keys]
    targets = [target / target.norm() for target in targets]
    total = 0.0
    for a, query in enumerate(queries):
        query = query / query.norm()
        denominator = sum(torch.exp(query @ other / temperature) for other in [*keys, *targets])
        terms = [torch.log(torch.exp(query @ keys[p] / temperature) / denominator) for p in [own[a], *positives[a]]]
        total = total - sum(terms) / len(terms)
        if len(targets) and labels[a] >= 0:
            total = total - weight * torch.log(torch.exp(query @ targets[labels[a]] / temperature) / denominator)
    return total / len(queries)


def case(anchors, queue, count, classes, seed):
    """Queries, two tensors of keys, the label of every key, and sampled positives as tensors and as lists."""
    torch.manual_seed(seed)
    draw = {"dtype": torch.float64, "requires_grad": True}
    queries, batch, old = (torch.randn(n, 4, **draw) for n in (anchors, anchors, queue))
    labels = torch.randint(-1, classes, (anchors + queue,))
    own = torch.arange(anchors)
    places, mask = sample_positives(own, labels, torch.rand(anchors, count, dtype=torch.float64))
    lists = [row[there].tolist() for row, there in zip(places, mask, strict=True)]
    return queries, (batch, old), labels, own, (places, mask), lists


@given(
    anchors=st.integers(1, 5),
    queue=st.integers(1, 7),
    count=st.integers(1, 4),
    classes=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20, deadline=None)
def test_kcl_equals_the_equation(anchors, queue, count, classes, seed):
    queries, keys, _, own, sampled, lists = case(anchors, queue, count, classes, seed)
    ours = kcl(queries, keys, own, *sampled, temperature=0.2)
    theirs = by_the_equation(queries, torch.cat(keys), own, lists, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    inputs = (queries, *keys)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(
    anchors=st.integers(1, 5),
    queue=st.integers(1, 7),
    count=st.integers(1, 4),
    classes=st.integers(1, 3),
    weight=st.sampled_from([0.0, 0.2, 3.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20, deadline=None)
def test_tsc_equals_the_equation(anchors, queue, count, classes, weight, seed):
    queries, keys, labels, own, sampled, lists = case(anchors, queue, count, classes, seed)
    targets = torch.randn(classes, 4, dtype=torch.float64, requires_grad=True)
    mine = labels[:anchors]
    ours = kcl(queries, keys, own, *sampled, temperature=0.2, targets=Targets(targets, mine, weight))
    theirs = by_the_equation(queries, torch.cat(keys), own, lists, 0.2, targets, mine.tolist(), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    inputs = (queries, *keys, targets)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("with_targets", [False, True])
def test_a_part_of_the_global_batch_has_its_share_of_the_loss(with_targets):
    queries, keys, labels, own, (places, mask), _ = case(8, 20, 3, 2, 3)
    targets = torch.randn(2, 4, dtype=torch.float64)

    def loss(rows):
        pull = Targets(targets, labels[own[rows]], 0.2) if with_targets else None
        return kcl(queries[rows], keys, own[rows], places[rows], mask[rows], temperature=0.1, targets=pull)

    parts = [loss(slice(0, 4)), loss(slice(4, 8))]
    whole = loss(slice(0, 8))
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)
    (a,), (b,) = torch.autograd.grad(sum(parts) / 2, queries), torch.autograd.grad(whole, queries)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_blocks_of_anchors_change_nothing(monkeypatch):
    queries, keys, labels, own, sampled, _ = case(9, 11, 3, 2, 4)
    pull = Targets(torch.randn(2, 4, dtype=torch.float64), labels[:9], 0.2)
    whole = kcl(queries, keys, own, *sampled, temperature=0.1, targets=pull)
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", 4 * 22)
    torch.testing.assert_close(kcl(queries, keys, own, *sampled, temperature=0.1, targets=pull), whole)


@pytest.mark.parametrize(
    ("queries", "keys", "labels"),
    [
        (torch.randn(3, 4), torch.randn(9, 4), torch.zeros(9, dtype=torch.int64)),  # one class
        (torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])),  # one image a class, no queue
        (torch.randn(3, 4), torch.randn(9, 4), torch.full((9,), -1)),  # nothing known
        (torch.randn(1, 4), torch.randn(1, 4), torch.tensor([0])),  # one image
        (torch.ones(3, 4), torch.ones(9, 4), torch.arange(9) % 3),  # copies of one image
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.arange(9) % 3),  # no direction at all
        (1e4 * torch.randn(3, 4), 1e4 * torch.randn(9, 4), torch.arange(9) % 3),
    ],
)
@pytest.mark.parametrize("temperature", [0.07, 1e-3])
def test_degenerate_batches_have_finite_losses_and_gradients(queries, keys, labels, temperature):
    queries = queries.clone().requires_grad_()
    own = torch.arange(len(queries))
    sampled = sample_positives(own, labels, torch.rand(len(queries), 3, dtype=torch.float64))
    pull = Targets(uniform_targets(3, 4, 0).float(), labels[own], 0.2)
    loss = kcl(queries, keys, own, *sampled, temperature=temperature, targets=pull)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(queries.grad).all()


def test_low_precision_embeddings_are_compared_in_float32():
    queries, keys, _, own, sampled, _ = case(4, 6, 2, 2, 5)
    low = kcl(queries.bfloat16(), [keys[0].bfloat16(), keys[1].float()], own, *sampled, temperature=0.1)
    assert low.dtype == torch.float32


def test_a_temperature_of_zero_is_refused():
    queries, keys, _, own, sampled, _ = case(2, 2, 1, 2, 6)
    with pytest.raises(ValueError, match="temperature"):
        kcl(queries, keys, own, *sampled, temperature=0.0)


@given(
    anchors=st.integers(1, 8),
    queue=st.integers(0, 20),
    count=st.integers(1, 6),
    classes=st.integers(1, 4),
    extreme=st.sampled_from([None, 0.0, 1 - 2**-53]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_sampled_positives_are_different_keys_of_the_class_and_never_the_own(
    anchors, queue, count, classes, extreme, seed
):
    torch.manual_seed(seed)
    labels = torch.randint(-1, classes, (anchors + queue,))
    own = torch.randperm(anchors + queue)[:anchors]
    draws = torch.rand(anchors, count, dtype=torch.float64)
    places, mask = sample_positives(own, labels, draws if extreme is None else torch.full_like(draws, extreme))
    for a in range(anchors):
        label = labels[own[a]].item()
        candidates = {k for k in range(len(labels)) if labels[k] == label and k != own[a]} if label >= 0 else set()
        chosen = places[a][mask[a]].tolist()
        assert len(set(chosen)) == len(chosen) == min(count, len(candidates))
        assert set(chosen) <= candidates
    assert ((places >= 0) & (places < len(labels))).all()


@pytest.mark.parametrize("own", [0, 5, 9])
def test_all_sets_of_positives_are_equally_likely(own):
    seed, times = 20 + own, 30_000
    print(f"seed {seed}")
    # Candidates at places that are not one run of keys; the own key is the first, one inside and the last of the class.
    labels = torch.tensor([1, 0, 1, 2, -1, 1, 1, 0, -1, 1])
    candidates = [k for k in (0, 2, 5, 6, 9) if k != own]
    draws = torch.rand(times, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    places, mask = sample_positives(torch.full((times,), own), labels, draws)
    assert mask.all()
    orders = list(itertools.permutations(candidates, 2))
    expected = times / len(orders)
    counts = [(places == torch.tensor(order)).all(dim=1).sum().item() for order in orders]
    assert sum(counts) == times
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 31.3  # 11 degrees of freedom: one run of a thousand would be above


def test_sampling_makes_no_tensor_of_all_pairs():
    """16,384 anchors among 262,144 keys: 4 GiB of pairs even as bytes, against a few MB."""
    anchors, keys = 1 << 14, 1 << 18
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (keys,), generator=draw)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sample_positives(torch.arange(anchors), labels, torch.rand(anchors, 3, dtype=torch.float64, generator=draw))
    assert max(event.cpu_memory_usage for event in profile.events()) < 64 << 20


@pytest.mark.parametrize(("count", "width"), [(2, 1), (2, 128), (3, 2), (5, 4), (14, 128), (129, 128)])
def test_few_targets_are_a_regular_simplex(count, width):
    targets = uniform_targets(count, width, 3)
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(targets @ targets.T, expected, rtol=0, atol=1e-12)


def spread(targets):
    """Equation 3 in plain loops, less its constant."""
    total = 0.0
    for i, a in enumerate(targets):
        near = sum(math.exp((float(a @ b) - 1) / 0.07) for j, b in enumerate(targets) if j != i)
        total += math.log1p(near)
    return total / len(targets)


def circle(count):
    turn = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    return torch.stack([turn.cos(), turn.sin()], dim=1)


def octahedron():
    return torch.cat([torch.eye(3), -torch.eye(3)]).double()


def icosahedron():
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    turned = [corner[-turn:] + corner[:-turn] for turn in (0, 1, 2) for corner in corners]
    return torch.nn.functional.normalize(torch.tensor(turned, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("best", [circle(4), circle(5), circle(9), octahedron(), icosahedron()], ids=len)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_targets_reach_the_known_optimum(best, seed):
    targets = uniform_targets(*best.shape, seed)
    torch.testing.assert_close(targets.norm(dim=1), torch.ones(len(best), dtype=torch.float64))
    assert spread(targets) == pytest.approx(spread(best), rel=1e-6)
    # The same arrangement, up to a rotation: the same cosines.
    cosines, expected = ((x @ x.T).flatten().sort().values for x in (targets, best))
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-4)


def test_targets_of_many_classes_are_where_no_step_improves_them():
    targets = uniform_targets(165, 128, 0).requires_grad_()  # RadImageNet's classes
    unit = targets / targets.norm(dim=1, keepdim=True)
    near = torch.exp((unit @ unit.T - 1) / 0.07)
    value = torch.log1p(near.sum(dim=1) - near.diagonal()).mean()
    (slope,) = torch.autograd.grad(value, targets)
    assert slope.norm() < 1e-6 * value
    assert spread(targets.detach()) < 0.6 * spread(torch.nn.functional.normalize(torch.randn(165, 128), dim=1))


@pytest.mark.parametrize(("count", "width"), [(3, 8), (9, 4)])
def test_targets_are_a_function_of_the_seed_and_leave_the_global_one_alone(count, width):
    before = torch.get_rng_state()
    first, again, other = (uniform_targets(count, width, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_target_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        uniform_targets(1, 8, 0)


@given(count=st.integers(2, 6), seen=st.integers(0, 6), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_targets_are_matched_at_the_least_total_distance(count, seen, seed):
    torch.manual_seed(seed)
    seen = min(seen, count)
    centers = torch.nn.functional.normalize(torch.randn(count, 5), dim=1)
    order = torch.randperm(count)
    centers[order[seen:]] = 0  # not seen yet
    targets = uniform_targets(count, 5, seed)
    found = match(centers, targets)
    assert sorted(found.tolist()) == list(range(count))

    def distance(matched):
        """Of the classes that were seen: the others take what is left."""
        return sum((centers[c].double() - targets[matched[c]]).norm().item() for c in order[:seen].tolist())

    best = min(distance(matched) for matched in itertools.permutations(range(count)))
    assert distance(found.tolist()) == pytest.approx(best, abs=1e-9)
