"""If these fail, a run does not see the samples it says it sees."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.data.counter import hash64, normal, uniform
from medpretrain.data.order import Order, WeightedOrder, counterparts, permute

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**62)


@given(size=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation_of_any_size(size, seed):
    assert sorted(permute(np.arange(size), size, hash64(seed)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [4**10, 4**10 + 1, 4**10 - 1])
def test_permute_covers_sizes_about_a_power_of_four(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, hash64(1))), np.arange(size))


def test_a_permutation_sends_every_index_everywhere_alike():
    places = np.stack([permute(np.arange(16), 16, hash64(seed)) for seed in range(4000)])
    counts = np.stack([np.bincount(places[:, index], minlength=16) for index in range(16)])
    chi_square = ((counts - 250) ** 2 / 250).sum(axis=1)
    assert chi_square.max() < 60  # 15 degrees of freedom: p < 1e-6
    neighbours = np.corrcoef(places[:, 3], places[:, 4])[0, 1]
    assert abs(neighbours + 1 / 15) < 0.08


@given(
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    block=st.integers(0, 5),
    batch=st.integers(1, 30),
    seed=seeds,
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_once_whatever_the_batch(shards, block, batch, seed):
    samples = sum(shards)
    order = Order(seed, samples, tuple(shards), block)
    steps = [order.step(step, batch) for step in range(-(-3 * samples // batch))]
    epoch = np.concatenate([places.epoch for places in steps])
    sample = np.concatenate([places.sample for places in steps])
    for one in range(3):
        assert sorted(sample[epoch == one].tolist()) == list(range(samples))


def test_epochs_and_seeds_are_shuffled_differently():
    one, two, other = Order(0, 500).places(0, 500), Order(0, 500).places(500, 500), Order(1, 500).places(0, 500)
    assert (one.sample == two.sample).sum() < 10
    assert (one.sample == other.sample).sum() < 10


def test_blocks_read_from_few_shards_at_a_time():
    order = Order(seed=3, samples=1000, shard_sizes=(10,) * 100, block_shards=4)
    shards = [set((order.step(step, 20).sample // 10).tolist()) for step in range(50)]
    assert max(map(len, shards)) <= 4
    assert len(set().union(*shards)) == 100
    assert order.step(0, 40).sample.tolist() != sorted(order.step(0, 40).sample.tolist())


def test_the_parts_of_the_ranks_make_the_global_batch():
    order = Order(7, 103)
    whole = order.step(5, 24)
    for world in (1, 2, 3, 4):
        local = 24 // world
        parts = [order.places(5 * 24 + rank * local, local) for rank in range(world)]
        assert np.array_equal(np.concatenate([part.sample for part in parts]), whole.sample)


@st.composite
def weighted_orders(draw):
    weights = draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
    shares = tuple(Fraction(weight, sum(weights)) for weight in weights)
    batch = math.ceil(1 / min(shares)) + draw(st.integers(0, 30))
    shards = tuple(tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))) for _ in weights)
    return WeightedOrder(draw(seeds), shares, shards, batch, draw(st.integers(0, 3)))


@given(order=weighted_orders(), first=st.integers(0, 10**9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_datasets_have_their_shares_of_every_batch_and_go_through_epochs_of_their_own(order, first, data):
    steps, batch = 12, order.global_batch
    edges = np.cumsum([0, *(sum(sizes) for sizes in order.shard_sizes)])
    whole = order.places(0, steps * batch)
    dataset = np.searchsorted(edges, whole.sample, side="right") - 1
    given_by_step = np.stack([np.bincount(part, minlength=len(order.shares)) for part in dataset.reshape(steps, batch)])
    for number, share in enumerate(order.shares):
        assert all(abs(count - share * batch) < 2 for count in given_by_step[:, number].tolist())
        given = np.cumsum(given_by_step[:, number]).tolist()
        assert all(abs(count - share * batch * (step + 1)) <= 1 for step, count in enumerate(given))
        epoch, sample = whole.epoch[dataset == number], whole.sample[dataset == number]
        size = edges[number + 1] - edges[number]
        assert sorted(epoch.tolist()) == [place // size for place in range(len(epoch))]
        for one in range(epoch.max()):  # all but the last, which has not ended
            assert sorted(sample[epoch == one].tolist()) == list(range(edges[number], edges[number + 1]))
        assert len(np.unique(sample[epoch == epoch.max()])) == (epoch == epoch.max()).sum()
    start = data.draw(st.integers(0, steps * batch - 1))
    count = data.draw(st.integers(1, steps * batch - start))
    for part, all_of_them in zip(order.places(start, count), whole, strict=True):
        assert np.array_equal(part, all_of_them[start : start + count])
    far = order.step(first, batch)  # no walk from the beginning, and no overflow
    assert np.array_equal(order.places((first + 1) * batch - 1, 1).sample, far.sample[-1:])


def test_equal_datasets_are_shuffled_differently_and_ranks_meet_each():
    order = WeightedOrder(0, (Fraction(1, 2), Fraction(1, 2)), ((500,), (500,)), 100)
    sample = order.places(0, 1000).sample
    one, two = sample[sample < 500], sample[sample >= 500] - 500
    assert sorted(one.tolist()) == sorted(two.tolist()) == list(range(500))
    assert (one == two).sum() < 10
    quarters = [np.split(order.step(step, 100).sample >= 500, 4) for step in range(10)]
    assert all(0 < of_rank.sum() < 25 for of_ranks in quarters for of_rank in of_ranks)


@given(count=st.integers(2, 200), seed=seeds, step=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_no_image_is_its_own_counterpart_and_each_is_one(count, seed, step):
    partner = counterparts(seed, step, count)
    assert sorted(partner.tolist()) == list(range(count))
    assert not (partner == np.arange(count)).any()


def test_counterparts_need_two_images():
    with pytest.raises(ValueError, match="two images"):
        counterparts(0, 0, 1)


def test_draws_are_uniform_normal_and_independent_of_their_neighbours():
    draws = uniform(5, np.arange(200_000), 7)
    assert abs(draws.mean() - 0.5) < 0.004
    assert abs(draws.var() - 1 / 12) < 0.002
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01
    bell = normal(5, np.arange(200_000))
    assert abs(bell.mean()) < 0.01
    assert abs(bell.std() - 1) < 0.01
