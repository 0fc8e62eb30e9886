"""What KCL and TSC remember from step to step, and that it is the same however the batch is shared out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.k_positive import kcl as kcl_loss
from medpretrain.losses.k_positive import sample_positives
from medpretrain.methods import kcl as kcl_module
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.kcl import Kcl, KclOptions
from medpretrain.methods.tsc import Tsc, TscOptions
from tests.methods.flat import Flat

DATA = TrainingSet(20, {"class": ("a", "b", "c")}, {"class": (5, 8, 7)}, seed=4)
TINY = {"queue": 10, "positives": 2, "projector": (5,), "momentum": 0.9}
PROGRESS = Progress(0, 10, 0.0)


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    return kind(kind.options(**TINY | options), Flat(), DATA).double()


def batch(labels, step=0, first=0):
    labels = torch.tensor(labels)
    return Batch(step, 0, len(labels), first, [], {"class": labels}, torch.arange(len(labels)))


def views(count, step):
    draw = torch.Generator().manual_seed(100 + step)
    return {"crop": [torch.randn(count, 1, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2)]}


LABELS = [[0, 1, 0, 2], [1, 1, -1, 0], [0, 0, 0, 0], [-1, -1, -1, -1]]


def train(method, steps):
    """Plain gradient descent on batches that are functions of the step; the losses."""
    losses = []
    for step in steps:
        labels = LABELS[step % len(LABELS)]
        outputs = method(views(len(labels), step))
        method.zero_grad()
        loss = method.loss(outputs, batch(labels, step), PROGRESS)
        loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        method.after_update(outputs, batch(labels, step), PROGRESS)
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("kind", [Kcl, Tsc])
def test_the_first_crop_is_the_query_and_the_second_the_key(kind):
    method = build(kind)
    for parameter in method.momentum_encoder.parameters():
        parameter.data += 0.1
    crops = views(4, 0)
    first, second = crops["crop"]
    outputs = method(crops)
    query = method.encoder["projector"](method.encoder["backbone"](first))
    key = method.momentum_encoder["projector"](method.momentum_encoder["backbone"](second))
    torch.testing.assert_close(outputs["query"], query[:, None])
    torch.testing.assert_close(outputs["key"], key[:, None])
    assert not outputs["key"].requires_grad


@pytest.mark.parametrize("kind", [Kcl, Tsc])
def test_the_queue_holds_the_last_keys_with_their_labels(kind):
    method = build(kind)
    keys = []
    for step in range(3):
        keys.append(method(views(4, step))["key"][:, 0])
        train(method, [step])
    # 12 keys in 10 places: the first two were replaced by the last two.
    expected = F.normalize(torch.cat(keys), dim=1)
    torch.testing.assert_close(method.queue.embeddings, torch.cat([expected[10:], expected[2:10]]))
    labels = list(itertools.chain(*LABELS[:3]))
    assert method.queue.labels.tolist() == labels[10:] + labels[2:10]


def test_the_loss_pulls_to_the_own_key_and_sampled_ones_of_batch_and_queue():
    method = build(Kcl)
    train(method, range(2))
    outputs, now = method(views(4, 2)), batch(LABELS[0], step=2)
    keys = torch.cat([outputs["key"][:, 0], method.queue.embeddings])
    labels = torch.cat([now.labels["class"], method.queue.labels])
    # The expected loss over the draws, by many of them; the method's own draws are one step's each.
    own = torch.arange(4)
    many = []
    for seed in range(300):
        draws = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        positives, mask = sample_positives(own, labels, draws)
        many.append(kcl_loss(outputs["query"][:, 0], keys, own, positives, mask, temperature=0.07))
    found = []
    for step in range(300):
        found.append(method.loss(outputs, batch(LABELS[0], step), PROGRESS))
    assert len({loss.item() for loss in found}) > 20  # draws differ from step to step
    expected, spread = torch.stack(many).mean(), torch.stack(many).std()
    assert abs(torch.stack(found).mean() - expected) < 5 * spread * (2 / 300) ** 0.5


@pytest.mark.parametrize("kind", [Kcl, Tsc])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_loss_and_gradient_of_the_global_batch(kind, ranks, monkeypatch):
    method = build(kind)
    train(method, range(3))
    outputs = method(views(8, 3))
    labels = [0, 1, 0, 2, 1, -1, 0, 1]
    whole = method.loss(outputs, batch(labels), PROGRESS)
    query = outputs["query"]
    (expected,) = torch.autograd.grad(whole, query, retain_graph=True)
    keys = outputs["key"][:, 0]
    monkeypatch.setattr(kcl_module, "gather", lambda part: keys)
    size = 8 // ranks
    total = 0.0
    for first in range(0, 8, size):
        part = {name: value[first : first + size] for name, value in outputs.items()}
        total = total + method.loss(part, batch(labels, first=first), PROGRESS) / ranks
    (found,) = torch.autograd.grad(total, query)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [Kcl, Tsc])
def test_only_the_trained_encoder_has_a_gradient(kind):
    method = build(kind)
    train(method, range(2))
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.encoder.parameters())


@pytest.mark.parametrize("kind", [Kcl, Tsc])
def test_a_restored_method_continues_bit_for_bit(kind):
    method = build(kind)
    train(method, range(3))
    state = copy.deepcopy(method.state_dict())
    expected = train(method, range(3, 7))
    restored = build(kind, seed=9)
    restored.load_state_dict(state)
    found = train(restored, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for name, value in method.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


@pytest.mark.parametrize("kind", [Kcl, Tsc])
def test_nothing_depends_on_the_global_random_state(kind):
    first, second = build(kind), build(kind)
    expected = train(first, range(3))
    torch.manual_seed(77)
    assert all(torch.equal(a, b) for a, b in zip(train(second, range(3)), expected, strict=True))


@pytest.mark.parametrize("kind", [Kcl, Tsc])
@pytest.mark.parametrize("labels", [[0], [-1], [1, 1, 1], [-1, -1, -1], [0, 1, 2]])
def test_degenerate_batches_have_finite_losses_gradients_and_state(kind, labels):
    method = build(kind)
    outputs = method(views(len(labels), 0))
    loss = method.loss(outputs, batch(labels), PROGRESS)
    loss.backward()
    method.after_update(outputs, batch(labels), PROGRESS)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in method.encoder.parameters())
    assert all(torch.isfinite(buffer).all() for buffer in method.buffers())


def test_without_weight_the_targets_are_negatives_alone_and_with_it_they_pull():
    method = build(Tsc, target_weight=0.0)
    outputs, now = method(views(4, 0)), batch(LABELS[0])
    negatives = method.loss(outputs, now, PROGRESS)
    plain = build(Kcl)
    plain.load_state_dict(method.state_dict(), strict=False)
    assert negatives > plain.loss(outputs, now, PROGRESS)
    pulled = build(Tsc, target_weight=0.5)
    pulled.load_state_dict(method.state_dict())
    query, targets = F.normalize(outputs["query"][:, 0], dim=1), method.targets
    keys = torch.cat([F.normalize(outputs["key"][:, 0], dim=1), method.queue.embeddings, targets])
    log_p = query @ targets.T / 0.07 - torch.logsumexp(query @ keys.T / 0.07, dim=1, keepdim=True)
    term = -torch.stack([log_p[a, method.target_of_class[label]] for a, label in enumerate(LABELS[0])]).mean()
    torch.testing.assert_close(pulled.loss(outputs, now, PROGRESS) - negatives, 0.5 * term)


def test_a_query_is_pulled_to_the_target_its_class_was_matched_to():
    """With the target alone as attraction, a step along the gradient brings each query closer to it."""
    method = build(Tsc, target_weight=1e6)
    method.target_of_class.copy_(torch.tensor([2, 0, 1]))
    outputs = method(views(3, 0))
    (slope,) = torch.autograd.grad(method.loss(outputs, batch([0, 1, 2]), PROGRESS), outputs["query"])
    query = outputs["query"][:, 0].detach()
    moved = F.normalize(query - 1e-9 * slope[:, 0], dim=1) - F.normalize(query, dim=1)
    for a, target in enumerate([2, 0, 1]):
        assert moved[a] @ method.targets[target] > 0


def test_centers_are_moving_means_of_the_queries_of_each_class():
    method = build(Tsc)
    queries = [method(views(4, step))["query"][:, 0].detach() for step in range(2)]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for step in range(2):
        for label in range(3):
            mine = [F.normalize(queries[step][n], dim=0) for n in range(4) if LABELS[step][n] == label]
            if not mine:
                continue
            mean = F.normalize(sum(mine) / len(mine), dim=0)
            moved = mean if expected[label].norm() == 0 else 0.9 * expected[label] + 0.1 * mean
            expected[label] = F.normalize(moved, dim=0)
        method.after_update(method(views(4, step)), batch(LABELS[step], step), PROGRESS)
        torch.testing.assert_close(method.centers, expected)


@pytest.mark.parametrize("near", itertools.permutations(range(3)))
def test_classes_are_matched_to_targets_at_the_least_total_distance(near):
    method = build(Tsc)
    method.centers.copy_(F.normalize(method.targets[list(near)] + 0.2, dim=1))
    train(method, [0])

    def distance(matched):
        return sum((method.centers[c] - method.targets[t]).norm().item() for c, t in enumerate(matched))

    best = min(itertools.permutations(range(3)), key=distance)
    assert best == near  # so that every permutation is an answer once
    assert tuple(method.target_of_class.tolist()) == best


def test_a_class_not_seen_yet_takes_the_target_that_is_left():
    method = build(Tsc)
    for own in range(3):
        method.centers.copy_(method.targets[[(own + 1) % 3, own, own]])
        method.centers[2] = 0
        outputs = method(views(2, 0))
        method.after_update(outputs, batch([-1, -1]), PROGRESS)
        assert method.target_of_class.tolist() == [(own + 1) % 3, own, (own + 2) % 3]


def test_between_matchings_classes_keep_their_targets():
    method = build(Tsc, match_every=3)
    train(method, [0])
    kept = method.target_of_class.clone()
    method.centers.copy_(method.targets[kept.roll(1)])
    for step, stays in ((1, True), (2, True), (3, False)):
        train(method, [step])
        assert torch.equal(method.target_of_class, kept) == stays


@pytest.mark.parametrize("options", [KclOptions(queue=64), TscOptions(queue=64)])
def test_what_cannot_be_trained_is_refused(options):
    kind = {"kcl": Kcl, "tsc": Tsc}[options.name]
    kind.check(options, DATA, 64)
    with pytest.raises(UserError, match=f"{options.name} puts 65 .* method.queue to at least 65"):
        kind.check(options, DATA, 65)
    with pytest.raises(UserError, match=r"one 'class'; give another data\.labels"):
        kind.check(options, TrainingSet(5, {"class": ("a", "b")}, {"class": (5, 0)}), 8)
    with pytest.raises(UserError, match=r"no image .* give another data\.labels"):
        kind.check(options, TrainingSet(5, {"class": ("a", "b")}, {"class": (0, 0)}), 8)
    with pytest.raises(UserError, match="learns from one label kind"):
        kind.check(options, TrainingSet(5, {"x": ("a",), "y": ("b",)}, {"x": (5,), "y": (5,)}), 8)
