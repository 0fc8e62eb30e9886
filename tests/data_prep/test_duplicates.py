"""Every copy is found, none is invented, and what is left out is what must go."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data_prep import duplicates
from data_prep.duplicates import Copies, contradictory, drop_exact, drop_near, exact, near, report
from data_prep.errors import UserError

SPLITS = ["extra", "test", "train", "val"]
EXTRA, TEST, TRAIN, VAL = range(4)


def digests(*numbers: int) -> np.ndarray:
    return np.array([list(number.to_bytes(16, "big")) for number in numbers], np.uint8).reshape(-1, 16)


def hashes(seed: int) -> np.ndarray:
    """Far and near hashes, dense clusters, equal ones, and rows without a hash."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(1, 2**64, 300, dtype=np.uint64)]
    for size, flips in ((60, 1), (60, 3), (200, 5)):
        cluster = np.repeat(rng.integers(1, 2**64, 2, dtype=np.uint64), size)
        for _ in range(flips):
            cluster ^= np.uint64(1) << rng.integers(0, 64, len(cluster)).astype(np.uint64)
        parts.append(cluster)
    parts += [np.zeros(50, np.uint64), np.repeat(parts[0][:3], 20)]
    return rng.permutation(np.concatenate(parts))


def neighbours(values: np.ndarray, distance: int) -> np.ndarray:
    """By brute force, which rows are near copies of which: (N, N) bool."""
    known = values != 0
    close = np.bitwise_count(values[:, None] ^ values[None]) <= distance
    return np.asarray(close & known[:, None] & known[None])


def spread(copies: Copies) -> np.ndarray:
    """The same as `neighbours`, from `copies`."""
    count = int(copies.group.max()) + 1
    linked = np.eye(count + 1, dtype=bool)
    linked[-1, -1] = False
    linked[copies.pairs[:, 0], copies.pairs[:, 1]] = linked[copies.pairs[:, 1], copies.pairs[:, 0]] = True
    return np.asarray(linked[copies.group[:, None], copies.group[None]])


@pytest.mark.parametrize("distance", range(9))
def test_near_finds_all_pairs_within_the_distance_and_each_once(rng: random.Random, distance: int) -> None:
    values = hashes(rng.randrange(2**32))
    copies = near(values, distance)
    assert np.array_equal(spread(copies), neighbours(values, distance))
    assert len(np.unique(copies.pairs, axis=0)) == len(copies.pairs)
    assert (copies.pairs[:, 0] < copies.pairs[:, 1]).all()
    assert np.array_equal(copies.group < 0, values == 0)


def test_near_does_not_depend_on_the_order_of_rows(rng: random.Random) -> None:
    values = hashes(rng.randrange(2**32))
    turned = near(values[::-1], 4)
    assert np.array_equal(turned.group[::-1], near(values, 4).group)
    assert np.array_equal(turned.pairs, near(values, 4).pairs)


def test_equal_and_missing_hashes_make_no_pairs() -> None:
    copies = near(np.repeat(np.array([0, 5, 2**63], np.uint64), 100_000), 2)
    assert copies.pairs.shape == (0, 2)
    assert np.bincount(copies.group + 1).tolist() == [100_000] * 3


@pytest.mark.parametrize("count", [0, 1])
def test_no_and_one_image(count: int) -> None:
    for copies in (near(np.ones(count, np.uint64)), near(np.zeros(count, np.uint64)), exact(digests(*[7] * count))):
        split = np.zeros(count, np.int64)
        assert report(copies, split, split).images == 0
        assert drop_near(copies, split, SPLITS).size == drop_exact(copies, split, SPLITS).size == 0


def test_too_many_pairs_and_an_odd_distance_are_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 5)
    with pytest.raises(UserError, match="lower distance"):
        near(np.arange(1, 30, dtype=np.uint64), 2)
    for distance in (-1, 9):
        with pytest.raises(UserError, match="from 0 to 8"):
            near(np.arange(3, dtype=np.uint64), distance)


def test_exact_groups_equal_digests_that_differ_in_one_byte_only() -> None:
    copies = exact(digests(5, 1 << 120, 5, 6, 1 << 120, 5))
    assert [len(set(copies.group[rows])) for rows in ([0, 2, 5], [1, 4], [0, 1, 3])] == [1, 1, 3]


@pytest.mark.parametrize("distance", [0, 2, 4])
def test_the_report_counts_what_brute_force_counts(rng: random.Random, distance: int) -> None:
    seed = rng.randrange(2**32)
    values = hashes(seed)
    numbers = np.random.default_rng(seed)
    # Most copies share patient and split, so that both kinds are there to be counted.
    patients = np.where(numbers.random(len(values)) < 0.9, values >> np.uint64(60), numbers.integers(0, 50))
    patients = patients.astype(np.int64)
    split_ids = np.where(numbers.random(len(values)) < 0.9, 0, 1)
    close = neighbours(values, distance) & ~np.eye(len(values), dtype=bool)
    other = (patients[:, None] != patients[None]) | (patients[:, None] == 0)
    found = report(near(values, distance), patients, split_ids)
    assert found.images == close.any(axis=1).sum()
    assert found.across_patients == (close & other).any(axis=1).sum()
    assert found.across_splits == (close & (split_ids[:, None] != split_ids[None])).any(axis=1).sum()
    assert 0 < found.across_splits < found.images
    sizes = np.unique(values[values != 0], return_counts=True)[1]
    assert found.groups == (sizes > 1).sum()


def test_of_exact_copies_the_one_of_the_test_stays_else_the_first() -> None:
    copies = exact(digests(1, 1, 1, 2, 2, 3, 3, 4, 5, 5))
    split_ids = np.array([TRAIN, VAL, TEST, TRAIN, EXTRA, TRAIN, TRAIN, TRAIN, EXTRA, VAL])
    assert drop_exact(copies, split_ids, SPLITS).tolist() == [0, 1, 3, 6, 8]


def test_near_copies_go_from_train_before_val_and_never_from_test() -> None:
    values = np.array([0xF00, 0xF03, 0xF0F, 0xFF << 40, (0xFF << 40) + 1, 0xFF << 50], np.uint64)
    copies = near(values, 2)
    # A chain: 0 near 1 near 2. Row 1 goes for 0; row 2 stays, since the one it is near does not.
    split_ids = np.array([TEST, VAL, TRAIN, TRAIN, VAL, TRAIN])
    assert drop_near(copies, split_ids, SPLITS).tolist() == [1, 3]
    assert drop_near(copies, np.full(6, TRAIN), SPLITS).size == 0
    assert drop_near(copies, np.full(6, TEST), SPLITS).size == 0


def test_after_dropping_no_near_copies_cross_splits_and_each_dropped_had_a_reason(rng: random.Random) -> None:
    seed = rng.randrange(2**32)
    values = hashes(seed)
    split_ids = np.random.default_rng(seed).integers(0, 4, len(values))
    dropped = drop_near(near(values, 4), split_ids, SPLITS)
    kept = np.setdiff1d(np.arange(len(values)), dropped)
    close = neighbours(values, 4)
    crossing = close & (split_ids[:, None] != split_ids[None])
    assert not crossing[np.ix_(kept, kept)].any()
    assert crossing[np.ix_(dropped, kept)].any(axis=1).all()
    assert not (split_ids[dropped] == TEST).any()
    assert dropped.size


def test_copies_under_different_labels_are_named_and_unknown_labels_agree() -> None:
    copies = exact(digests(1, 1, 2, 2, 3, 3, 3))
    labels = np.array([[0, 5], [1, 5], [2, -1], [2, 7], [4, 4], [4, -1], [-1, 5]], np.int32)
    assert contradictory(copies, labels).tolist() == [0, 1, 4, 6]
    assert contradictory(copies, labels[:, 0]).tolist() == [0, 1]
