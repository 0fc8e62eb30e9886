"""Which images of a dataset stand in it more than once: exactly, or nearly, and which of them to leave out.

All functions work on columns with a row an image. Exact copies have the same pixels: of them one is enough, and a copy
in the test split is an answer given away. Near copies have perceptual hashes that differ in few bits. Those of one
patient are normal (neighbouring slices). But a hash of 64 bits cannot tell a re-encoded copy from another patient's
image of the same kind: see `near`. So near copies are counted, and left out only where they would cross splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import UserError
from data_prep.fingerprint import NO_PHASH

DISTANCE = 2
MAX_DISTANCE = 8
MAX_PAIRS = 1 << 26  # half a gigabyte of row numbers
# Whose images stay when a copy stands in two splits: a test that others use too must not change. The rest between.
_FIRST = {"test": 0, "val": 1, "train": 3}
_OTHER = 2


@dataclass(frozen=True)
class Copies:
    """Which rows are copies of which.

    Attributes:
        group: (N,) the number of each row's digest or hash, from 0; -1 for a row without a hash.
        pairs: (E, 2) int32 numbers of groups that lie near each other, each pair once, lower number first.
    """

    group: np.ndarray
    pairs: np.ndarray


@dataclass(frozen=True)
class DuplicateReport:
    """How many copies there are.

    Attributes:
        groups: groups of two or more images with the same digest or hash.
        pairs: pairs of different hashes within the distance; 0 for exact copies.
        images: images that have a copy.
        across_patients: of these, how many have one of another patient. An unknown patient counts as another.
        across_splits: of these, how many have one in another split.
    """

    groups: int
    pairs: int
    images: int
    across_patients: int
    across_splits: int


def exact(digests: np.ndarray) -> Copies:
    """Group equal digests.

    Args:
        digests: (N, 16) uint8.
    """
    assert digests.ndim == 2, digests.shape
    whole = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").ravel()
    group = np.unique(whole, return_inverse=True)[1].reshape(-1)
    return Copies(group.astype(np.int64), np.zeros((0, 2), np.int32))


def near(phashes: np.ndarray, distance: int = DISTANCE) -> Copies:
    """Group equal perceptual hashes, and find all pairs of different ones within a Hamming distance, none missed.

    Rows without a hash (flat images, images that were not decoded) have no near copies.

    What a distance finds of re-encoded copies (JPEG quality 30 to 95, sizes from a third to double, brightness, gamma)
    and what it takes for copies by mistake, on 1,678 retinal photographs of 224 pixels: 0 bits 73 % and
    1 pair of images, 2 bits 98 % and 20 pairs, 4 bits 99.9 % and 224. On 6,000 CT, MR and X-ray images of 64 pixels
    it finds 68, 92 and 97 %. Hence 2. False pairs grow with the square of the number of images.

    Hashes within distance d that are cut into d + c blocks agree in at least c blocks, so a sort by each choice of c
    blocks brings them together (Manku, Jain and Das Sarma, WWW 2007).

    Args:
        phashes: (N,) uint64.
        distance: from 0 to 8.

    Raises:
        UserError: a distance out of range, or so large that more than `MAX_PAIRS` pairs are found.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise UserError(f"the distance of near copies must be from 0 to {MAX_DISTANCE} bits, not {distance}")
    values, group = np.unique(phashes, return_inverse=True)
    group = group.reshape(-1).astype(np.int64)
    if values.size and values[0] == NO_PHASH:
        values, group = values[1:], group - 1
    found = [np.zeros((0, 2), np.int32)]
    total = 0
    masks = _masks(distance)
    for number, mask in enumerate(masks):
        key = values & mask
        order = np.argsort(key, kind="stable").astype(np.int32)
        key, sorted_values = key[order], values[order]
        # `at` are the places whose key is still the same `step` places on: a stretch of s equal keys lasts s - 1 steps.
        at = np.arange(len(values) - 1, dtype=np.int32) if distance else np.zeros(0, np.int32)
        step = 1
        while True:
            at = at[key[at] == key[at + step]]
            if not at.size:
                break
            differing = sorted_values[at] ^ sorted_values[at + step]
            close = np.bitwise_count(differing) <= distance
            differing, first = differing[close], at[close]
            for earlier in masks[:number]:  # which has found those already that agree in its blocks
                new = (differing & earlier) != 0
                differing, first = differing[new], first[new]
            if first.size:
                ends = np.stack((order[first], order[first + step]), axis=1)
                found.append(np.sort(ends, axis=1))
                total += len(ends)
                if total > MAX_PAIRS:
                    raise UserError(
                        f"more than {MAX_PAIRS} pairs of images lie within {distance} bits of each other: "
                        "take a lower distance"
                    )
            step += 1
            at = at[: np.searchsorted(at, len(values) - step)]
    return Copies(group, np.concatenate(found))


def _masks(distance: int) -> list[np.uint64]:
    """The bits of every choice of c among d + c blocks; c is a balance of few choices and few chance meetings."""
    chosen = 1 if distance < 2 else 2 if distance < 4 else 3
    edges = [round(64 * i / (distance + chosen)) for i in range(distance + chosen + 1)]
    blocks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [np.uint64(sum(choice)) for choice in itertools.combinations(blocks, chosen)]


def report(copies: Copies, patients: np.ndarray, split_ids: np.ndarray) -> DuplicateReport:
    """Count copies.

    Args:
        copies: of N rows. Near copies include the exact ones.
        patients: (N,) the patient's number, 0 for an unknown one.
        split_ids: (N,) the split's number.
    """
    rows = np.flatnonzero(copies.group >= 0)
    group = copies.group[rows]
    sizes = np.bincount(group)
    copied = (sizes + np.bincount(copies.pairs.ravel(), minlength=len(sizes)))[group] > 1
    patient, split = patients[rows], split_ids[rows]
    return DuplicateReport(
        groups=int((sizes > 1).sum()),
        pairs=len(copies.pairs),
        images=int(copied.sum()),
        across_patients=int((copied & ((patient == 0) | _mixed(copies.pairs, group, patient))).sum()),
        across_splits=int(_mixed(copies.pairs, group, split).sum()),
    )


def drop_exact(copies: Copies, split_ids: np.ndarray, splits: Sequence[str]) -> np.ndarray:
    """The rows to leave out so that one image of each group stays, ascending.

    What stays is the image of the test split, else of val, else of any other, else of train; of several, the first row.
    Copies may stand under different labels: see `contradictory`, for the row that stays need not be the right one.

    Args:
        copies: from `exact`.
        split_ids: (N,) places in `splits`.
        splits: the names.
    """
    order = np.argsort(_ranks(splits)[split_ids], kind="stable")
    kept = order[np.unique(copies.group[order], return_index=True)[1]]
    dropped = np.ones(len(order), bool)
    dropped[kept] = False
    return np.flatnonzero(dropped)


def drop_near(copies: Copies, split_ids: np.ndarray, splits: Sequence[str]) -> np.ndarray:
    """The rows to leave out so that no near copies stand in two splits, ascending.

    Test images stay, val images stay unless near one of test, the others, and train last, unless near one that stays.
    An image is left out only for one that stays within the distance, never along a chain. Copies within a split stay
    too, whosever they are: they do no harm to a test, and many are different images. The patient is no matter: one
    patient in two splits would be a leak as well.

    Args:
        copies: from `near`.
        split_ids: (N,) places in `splits`.
        splits: the names.
    """
    ranks = _ranks(splits)
    ahead = np.zeros(int(copies.group.max(initial=-1)) + 1, bool)  # groups with an image that stays, of splits before
    first, second = copies.pairs.T
    dropped = np.zeros(len(copies.group), bool)
    for number in np.argsort(ranks, kind="stable"):
        around = ahead.copy()
        around[first[ahead[second]]] = True
        around[second[ahead[first]]] = True
        rows = np.flatnonzero((split_ids == number) & (copies.group >= 0))
        groups = copies.group[rows]
        dropped[rows] = around[groups]
        ahead[groups[~around[groups]]] = True
    return np.flatnonzero(dropped)


def contradictory(copies: Copies, labels: np.ndarray) -> np.ndarray:
    """The rows of exact copies that do not agree in their labels, ascending: one of them is wrong.

    Args:
        copies: from `exact`.
        labels: (N,) or (N, L) the label's number, -1 for an unknown one, which agrees with all.
    """
    disagree = np.zeros(len(copies.group), bool)
    for column in labels.reshape(len(labels), -1).T:
        known = np.flatnonzero(column >= 0)
        disagree[known] |= _mixed(copies.pairs, copies.group[known], column[known])
    return np.flatnonzero(disagree)


def _ranks(splits: Sequence[str]) -> np.ndarray:
    return np.array([_FIRST.get(name, _OTHER) for name in splits])


def _mixed(pairs: np.ndarray, group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """For each row, whether its group and the groups near it hold two different values: (n,) bool."""
    count = max(int(group.max(initial=-1)), int(pairs.max(initial=-1))) + 1
    low = np.full(count, np.iinfo(np.int64).max)
    high = np.full(count, np.iinfo(np.int64).min)
    np.minimum.at(low, group, value)
    np.maximum.at(high, group, value)
    low_around, high_around = low.copy(), high.copy()
    for one, other in ((0, 1), (1, 0)):
        np.minimum.at(low_around, pairs[:, one], low[pairs[:, other]])
        np.maximum.at(high_around, pairs[:, one], high[pairs[:, other]])
    return np.asarray(low_around < high_around)[group]
