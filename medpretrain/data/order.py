"""Which samples a step sees, as a pure function of (seed, step).

The samples of all epochs form one endless sequence: position p holds a sample of epoch p // N. A step takes the next
global batch of positions, so no sample of an epoch is dropped, and a batch may reach into the next epoch. A run's place
in its data is its step number, whatever the number of ranks. Where datasets are mixed by weights, each goes through its
own epochs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpretrain.data.counter import hash64, mix64, purpose, uniform

_ROUNDS = 6  # four make a Feistel network a strong pseudorandom permutation (Luby and Rackoff 1988)
_ORDER = purpose("order")
_SHARDS = purpose("shards")
_COUNTERPART = purpose("counterpart")
_DATASET = purpose("dataset")
_MIXED = purpose("mixed")


class Places(NamedTuple):
    """The samples at some positions: `sample` (B,) and the `epoch` (B,) in which each is seen, both int64."""

    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]


def permute(index: NDArray[np.int64], size: NDArray[np.int64] | int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where `index` goes in the permutation of range(size) that `key` names, without a table.

    A Feistel network over the next power of four, walked until the result is inside the range (Black and Rogaway
    2002): O(1) memory an index, for any size.

    Args:
        index: (B,) values in [0, size).
        size: one size, or (B,) sizes of at least 1.
        key: (B,) or scalar; indices that share a key and a size are permuted together.

    >>> sorted(permute(np.arange(10), 10, hash64(3)).tolist()) == list(range(10))
    True
    """
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    bits = np.ceil(np.log2(np.maximum(sizes, 2).astype(np.float64)) / 2).astype(np.uint64)  # of one half
    bits += (np.uint64(1) << (np.uint64(2) * bits)) < sizes  # log2 may round down just above a power of four
    mask = (np.uint64(1) << bits) - np.uint64(1)
    value = index.astype(np.uint64)
    walking = np.ones(index.shape, dtype=bool)
    while walking.any():
        left, right = value[walking] >> bits[walking], value[walking] & mask[walking]
        with np.errstate(over="ignore"):
            for turn in range(_ROUNDS):
                mixed = mix64(right + mix64(keys[walking] + np.uint64(turn)))
                left, right = right, left ^ (mixed & mask[walking])
        value[walking] = (left << bits[walking]) | right
        walking = value >= sizes
    return value.astype(np.int64)


class SampleSequence(ABC):
    """An endless sequence of samples, each position of which is known without those before it."""

    @property
    @abstractmethod
    def epoch_size(self) -> int:
        """How many samples count as an epoch; where some are seen more often than others, not each of them once."""

    @abstractmethod
    def at(self, position: NDArray[np.int64]) -> Places:
        """The samples at any positions, (B,)."""

    def places(self, start: int, count: int) -> Places:
        """The samples at positions start .. start + count."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def step(self, step: int, global_batch: int) -> Places:
        """The global batch of a step, counted from 0."""
        return self.places(step * global_batch, global_batch)


@dataclass(frozen=True)
class Order(SampleSequence):
    """Epoch after epoch of all samples, each shuffled anew.

    Args:
        seed: names the order.
        samples: N, how many there are.
        shard_sizes: how many of the N samples each shard holds, in the order of the samples; needed for blocks.
        block_shards: 0 shuffles each epoch fully. G > 0 shuffles the shards, then the samples within each block of G
            shards, so that a step reads from few files (for network file systems and object stores).
    """

    seed: int
    samples: int
    shard_sizes: tuple[int, ...] = field(default=(), repr=False)
    block_shards: int = 0

    def __post_init__(self) -> None:
        assert self.samples > 0
        assert self.block_shards == 0 or sum(self.shard_sizes) == self.samples

    @property
    def epoch_size(self) -> int:
        return self.samples

    def at(self, position: NDArray[np.int64]) -> Places:
        epoch, index = np.divmod(position, self.samples)
        if self.block_shards == 0:
            return Places(epoch, permute(index, self.samples, hash64(self.seed, _ORDER, epoch)))
        sample = np.empty_like(index)
        for one in np.unique(epoch):
            here = epoch == one
            sample[here] = self._within_blocks(int(one), index[here])
        return Places(epoch, sample)

    def _within_blocks(self, epoch: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        shards, starts_here, block_edges = _shuffled_shards(self, epoch)
        block = np.searchsorted(block_edges, index, side="right") - 1
        first, end = block_edges[block], block_edges[block + 1]
        place = first + permute(index - first, end - first, hash64(self.seed, _ORDER, epoch, block))
        turn = np.searchsorted(starts_here, place, side="right") - 1
        first_of_shard = np.concatenate(([0], np.cumsum(self.shard_sizes)))[:-1]
        return first_of_shard[shards[turn]] + place - starts_here[turn]


@lru_cache(maxsize=64)
def _shuffled_shards(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The epoch's order of shards, where each begins in it, and the edges of the blocks."""
    number = np.arange(len(order.shard_sizes))
    shards = np.argsort(hash64(order.seed, _SHARDS, epoch, number), kind="stable")
    edges = np.concatenate(([0], np.cumsum(np.asarray(order.shard_sizes, dtype=np.int64)[shards])))
    block_edges = np.append(edges[:-1][:: order.block_shards], edges[-1])
    return shards, edges[:-1], block_edges


@dataclass(frozen=True)
class WeightedOrder(SampleSequence):
    """Datasets mixed by shares: each goes through its own epochs, small ones more often.

    How many images each dataset gives is fixed and not drawn: after t steps dataset d has given
    round(t B W_d) - round(t B W_(d-1)) images, B being the global batch and W the cumulative shares. So at the end of
    every step it is within one image of its share of the run, and within two in each batch. Draws would come near the
    share only on average, and how many came before a position, hence the place in the dataset's epochs, would be known
    only by drawing them all. Within a batch the datasets are shuffled, so that every rank meets all of them.

    Args:
        seed: names the order.
        shares: of each dataset, 1 together, at least one image of a global batch each.
        shard_sizes: for each dataset how many of its samples each shard holds. Samples are numbered through all.
        global_batch: B.
        block_shards: of each dataset, as in `Order`.
    """

    seed: int
    shares: tuple[Fraction, ...]
    shard_sizes: tuple[tuple[int, ...], ...] = field(repr=False)
    global_batch: int
    block_shards: int = 0

    def __post_init__(self) -> None:
        assert len(self.shares) == len(self.shard_sizes)
        assert sum(self.shares) == 1
        assert min(self.shares) * self.global_batch >= 1  # else the difference of two roundings may be negative

    @property
    def epoch_size(self) -> int:
        return sum(map(sum, self.shard_sizes))

    def at(self, position: NDArray[np.int64]) -> Places:
        step, index = np.divmod(position, self.global_batch)
        index = permute(index, self.global_batch, hash64(self.seed, _MIXED, step))
        dataset, own = np.empty_like(position), np.empty_like(position)  # own: the position in its own epochs
        for one in np.unique(step).tolist():
            here = step == one
            before = self._given(one)
            edges = self._given(one + 1) - before  # of the datasets in this batch, before it is shuffled
            which = np.searchsorted(edges, index[here], side="right") - 1
            dataset[here] = which
            own[here] = np.diff(before)[which] + index[here] - edges[which]
        if self.block_shards == 0:  # as the loop below does, for all at once: there may be hundreds
            sizes = np.array([order.samples for order in self._orders])
            seeds = hash64(self.seed, _DATASET, np.arange(len(sizes)))
            epoch, index = np.divmod(own, sizes[dataset])
            place = permute(index, sizes[dataset], hash64(seeds[dataset], _ORDER, epoch))
            return Places(epoch, (np.cumsum(sizes) - sizes)[dataset] + place)
        epoch, sample = np.empty_like(position), np.empty_like(position)
        first = 0
        for number, order in enumerate(self._orders):
            here = dataset == number
            found = order.at(own[here])
            epoch[here], sample[here] = found.epoch, first + found.sample
            first += order.samples
        return Places(epoch, sample)

    def _given(self, steps: int) -> NDArray[np.int64]:
        """How many images datasets 0 .. d - 1 have given together after some steps, for d = 0 ..= their number."""
        images = steps * self.global_batch
        return np.array([int(images * share + Fraction(1, 2)) for share in self._cumulative], dtype=np.int64)

    @cached_property
    def _cumulative(self) -> tuple[Fraction, ...]:
        return tuple(accumulate(self.shares, initial=Fraction(0)))

    @cached_property
    def _orders(self) -> tuple[Order, ...]:
        return tuple(
            Order(int(hash64(self.seed, _DATASET, number)), sum(sizes), sizes, self.block_shards)
            for number, sizes in enumerate(self.shard_sizes)
        )


@dataclass(frozen=True)
class InOrder(SampleSequence):
    """All N samples in the order of their numbers, again and again."""

    samples: int

    @property
    def epoch_size(self) -> int:
        return self.samples

    def at(self, position: NDArray[np.int64]) -> Places:
        return Places(*np.divmod(position, self.samples))


def counterparts(seed: int, step: int, count: int) -> NDArray[np.int64]:
    """For each image of a global batch another image of it: one random cycle through all, so no image meets itself.

    Raises:
        ValueError: fewer than two images.

    >>> partner = counterparts(seed=0, step=3, count=5)
    >>> sorted(partner.tolist()), bool((partner == np.arange(5)).any())
    ([0, 1, 2, 3, 4], False)
    """
    if count < 2:
        raise ValueError("a counterpart needs a global batch of at least two images")
    cycle = np.argsort(uniform(seed, _COUNTERPART, step, np.arange(count)), kind="stable")
    partner = np.empty(count, dtype=np.int64)
    partner[cycle] = np.roll(cycle, -1)
    return partner
