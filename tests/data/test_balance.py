"""If these fail, classes do not have the shares of a run that its recipe says they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from medpretrain.data.balance import BalancedOrder, balanced_order
from medpretrain.data.batches import Share, Stream
from medpretrain.data.mixture import Mixture
from medpretrain.data.views import View

UNKNOWN = -1


@st.composite
def balanced(draw):
    """Labels of a split, some unknown and some ids without images, and a global batch that fits them."""
    counts = draw(st.lists(st.integers(1, 40), min_size=2, max_size=6))
    ids = draw(st.lists(st.integers(0, 12), min_size=len(counts), max_size=len(counts), unique=True))
    labels = np.repeat([*ids, UNKNOWN], [*counts, draw(st.integers(0, 10))])
    labels = labels[np.random.default_rng(draw(st.integers(0, 100))).permutation(len(labels))]
    batch = draw(st.integers(len(counts), max(len(counts), len(counts) * min(counts))))
    how = draw(st.sampled_from(["over", "under"]))
    return labels, BalancedOrder.of(labels, how, seed=draw(st.integers(0, 2**62)), global_batch=batch), how


@given(given=balanced())
@settings(max_examples=40, deadline=None)
def test_classes_have_equal_shares_of_every_batch_and_go_through_epochs_of_their_own(given):
    labels, order, how = given
    batch, steps = order.global_batch, 12
    whole = order.places(0, steps * batch)
    present = np.unique(labels[labels >= 0])
    share = batch / len(present)
    seen = labels[whole.sample].reshape(steps, batch)
    for one in present:
        in_batch = (seen == one).sum(axis=1)
        assert (np.abs(in_batch - share) < 2).all()
        assert (np.abs(np.cumsum(in_batch) - share * np.arange(1, steps + 1)) <= 1).all()
        if batch % len(present) == 0:
            assert (in_batch == share).all()
        mine = np.flatnonzero(order.times_N * (labels == one))
        size = (labels == one).sum() if how == "over" else min((labels == other).sum() for other in present)
        assert len(mine) == size
        here = labels[whole.sample] == one
        times = np.bincount(whole.sample[here], minlength=len(labels))[mine]
        assert times.sum() == here.sum()
        assert times.max() - times.min() <= 1
        assert sorted(whole.epoch[here].tolist()) == [number // size for number in range(here.sum())]


@given(given=balanced())
@settings(max_examples=40, deadline=None)
def test_under_sampling_sees_a_fixed_part_of_each_class_and_an_epoch_is_that(given):
    labels, order, _ = given
    order = BalancedOrder.of(labels, "under", seed=order.seed, global_batch=order.global_batch)
    present = np.unique(labels[labels >= 0])
    smallest = min((labels == one).sum() for one in present)
    assert order.epoch_size == smallest * len(present)
    kept = np.concatenate(order.classes)
    assert [np.isin(np.flatnonzero(labels == one), kept).sum() for one in present] == [smallest] * len(present)
    assert (labels[kept] >= 0).all()
    assert set(order.places(0, 4 * order.epoch_size).sample) == set(kept)
    assert set(order.places(10**9, 4 * order.epoch_size).sample) <= set(kept)
    assert BalancedOrder.of(labels, "over", seed=0, global_batch=order.global_batch).epoch_size == len(labels)


@given(given=balanced(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_part_of_the_sequence_is_that_part_of_the_whole(given, data):
    labels, order, how = given
    again = BalancedOrder.of(labels, how, seed=order.seed, global_batch=order.global_batch)
    first = data.draw(st.integers(0, 10**9)) * order.global_batch
    whole = order.places(first, 3 * order.global_batch)
    start = data.draw(st.integers(0, 3 * order.global_batch - 1))
    count = data.draw(st.integers(1, 3 * order.global_batch - start))
    part = again.places(first + start, count)
    assert np.array_equal(part.sample, whole.sample[start : start + count])
    assert np.array_equal(part.epoch, whole.epoch[start : start + count])


def test_seeds_keep_other_images_and_shuffle_otherwise():
    labels = np.repeat([0, 1], [20, 400])
    one, two = (BalancedOrder.of(labels, "under", seed=seed, global_batch=10) for seed in (0, 1))
    assert np.array_equal(one.classes[0], two.classes[0])
    assert len(np.intersect1d(one.classes[1], two.classes[1])) < 10
    chosen = np.concatenate(
        [BalancedOrder.of(labels, "under", seed=seed, global_batch=10).classes[1] for seed in range(400)]
    )
    assert abs(chosen.mean() - 219.5) < 6  # 1.3 expected: no end of the split is preferred
    over = [BalancedOrder.of(labels, "over", seed=seed, global_batch=10).places(0, 100).sample for seed in (0, 1)]
    assert (over[0] == over[1]).sum() < 20


def test_images_are_seen_as_often_as_the_order_says():
    labels = np.array([0, 1, 1, 1, UNKNOWN, 2, 2, 0, 2, 2, 2])
    for how, times in (("over", {0: 11 / 6, 1: 11 / 9, 2: 11 / 15, UNKNOWN: 0}), ("under", {0: 1, UNKNOWN: 0})):
        order = BalancedOrder.of(labels, how, seed=0, global_batch=3)
        for label, expected in times.items():
            assert order.times_N[labels == label] == pytest.approx(expected)
        epochs = 600
        seen = np.bincount(order.places(0, epochs * order.epoch_size).sample, minlength=len(labels)) / epochs
        assert seen == pytest.approx(order.times_N, abs=0.01)


def stream(folders, **balance):
    options = {"split": "train", "seed": 3, "global_batch": 12}
    dataset = Mixture.open(folders)
    share = balance.pop("share", None)
    order = balanced_order(dataset, **options, **balance)
    settings = {"channels": 1, "mean": [0.0], "std": [1.0], "device": torch.device("cpu"), "threads": 1}
    views = {"crop": View(size=16, crop=(0.5, 1.0))}
    return Stream(dataset, views, **options, **settings, labels=["modality"], share=share, order=order)


def take(one, start, count):
    batches = one.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize("how", ["over", "under"])
def test_later_starts_ranks_and_micro_batches_see_the_same_balanced_batch(how, small_dataset, colour_dataset):
    """By a label that no method learns from, and that two datasets name differently."""
    folders = [small_dataset, colour_dataset]
    one = stream(folders, label="class", how=how)
    ids = one.dataset.labels("class")[one.dataset.rows("train")]
    counts = np.bincount(ids)
    assert counts.min() < counts.max()
    images = len(ids) if how == "over" else counts.min() * len(counts)
    assert (len(one), one.steps_per_epoch) == (images, images / 12)
    whole = take(one, 0, 4)
    for batch in whole:
        assert np.bincount(ids[batch.samples.numpy()]).tolist() == [3, 3, 3, 3]
    for world, micro_batches in ((1, 2), (3, 2)):
        parts = [
            take(stream(folders, label="class", how=how, share=Share(rank, world, micro_batches)), 2, 2)
            for rank in range(world)
        ]
        for turn in range(2):
            shared = [micro["crop"][0] for part in parts for micro in part[turn].micro]
            assert torch.equal(torch.cat(shared), whole[turn + 2].micro[0]["crop"][0])
            for part in parts:
                assert torch.equal(part[turn].labels["modality"], whole[turn + 2].labels["modality"])
                assert torch.equal(part[turn].samples, whole[turn + 2].samples)


def test_images_without_the_label_are_left_out_and_counted_in_the_log(small_dataset, colour_dataset, caplog):
    caplog.set_level("INFO")
    mixture = Mixture.open([small_dataset, colour_dataset])
    rows = mixture.rows("train")
    unknown = int((mixture.labels("modality")[rows] < 0).sum())
    order = balanced_order(mixture, "modality", "over", split="train", seed=0, global_batch=6)
    assert unknown > 0
    assert f"{unknown} of the {len(rows)} images of split 'train' have no known label 'modality'" in caplog.text
    seen = order.places(0, 20 * len(rows)).sample
    assert set(seen) == set(np.flatnonzero(mixture.labels("modality")[rows] >= 0))


@pytest.mark.parametrize(
    ("label", "batch", "message"),
    [
        ("modalty", 6, r"no label 'modalty' in .*did you mean 'modality'"),
        ("class", 2, r"each of the 3 classes of 'class' 0.667 images of train.global_batch=2; .* from 3 to \d+"),
        ("class", 60, r"20 images of train.global_batch=60; .* no more than the \d+ of '\w+'"),
    ],
)
@pytest.mark.parametrize("how", ["over", "under"])
def test_what_cannot_be_balanced_is_refused(label, batch, message, how, small_dataset):
    with pytest.raises(UserError, match=message):
        balanced_order(Mixture.open([small_dataset]), label, how, split="train", seed=0, global_batch=batch)


def test_the_batches_that_the_refusal_names_are_taken(small_dataset):
    mixture = Mixture.open([small_dataset])
    counts = np.bincount(mixture.labels("class")[mixture.rows("train")])
    for batch in (3, 3 * counts.min()):
        balanced_order(mixture, "class", "under", split="train", seed=0, global_batch=int(batch))
    with pytest.raises(UserError, match=f"from 3 to {3 * counts.min()}$"):
        balanced_order(mixture, "class", "under", split="train", seed=0, global_batch=int(3 * counts.min() + 1))


@pytest.mark.parametrize("known", [0, 1])
def test_fewer_than_two_classes_are_refused(known, small_dataset, monkeypatch):
    mixture = Mixture.open([small_dataset])
    ids = np.where(mixture.labels("class") == 0, 0 if known else UNKNOWN, UNKNOWN)
    monkeypatch.setattr(mixture, "labels", lambda name: ids)
    with pytest.raises(UserError, match=rf"two classes of 'class' with images, and split 'train' has {known}"):
        balanced_order(mixture, "class", "over", split="train", seed=0, global_batch=6)
