"""The images that lie nearest to an image, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError

# Similarities held at once: 2 ** 23 in float64 are 64 MiB.
_ELEMENTS = 2**23


def nearest_images(
    features_ND: Tensor,
    queries: Sequence[int],
    k: int,
    *,
    patients_N: NDArray[np.int64] | None = None,
) -> list[list[tuple[int, float]]]:
    """For each query the places of the k images of the highest cosine similarity, and that similarity, highest first.

    The image itself is not among them. Of equally similar images the one of the lower place comes first. Computed in
    float64.

    Args:
        features_ND: of N images, any scale.
        queries: places of some of them.
        k: at least 1; fewer are given where there are fewer.
        patients_N: a number a patient; images of the query's own patient are passed over. None: they are not.

    Raises:
        UserError: k below 1, features that are not finite.

    >>> nearest_images(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), [0], 2)
    [[(2, 1.0), (1, 0.0)]]
    """
    if k < 1:
        raise UserError(f"the nearest images are at least one; k is {k}")
    if not features_ND.isfinite().all():
        raise UserError("the features hold values that are not finite")
    unit_ND = F.normalize(features_ND.double(), dim=1)
    found = []
    chunk = max(1, _ELEMENTS // len(unit_ND))
    for start in range(0, len(queries), chunk):
        some = torch.tensor(queries[start : start + chunk], device=unit_ND.device)
        similar_QN = (unit_ND[some] @ unit_ND.T).clamp_(-1, 1).cpu().numpy()
        for query, similar_N in zip(some.tolist(), similar_QN, strict=True):
            other_N = np.arange(len(similar_N)) != query
            if patients_N is not None:
                other_N &= patients_N != patients_N[query]
            places = np.flatnonzero(other_N)
            best = places[np.argsort(-similar_N[places], kind="stable")[:k]]
            found.append([(int(place), float(similar_N[place])) for place in best])
    return found


def stratified(labels_N: NDArray[np.integer], at_most: int, seed: int) -> NDArray[np.int64]:
    """Places, ascending, of so many images at most, of each class its share (rounded) and one at least.

    Raises:
        UserError: fewer places than classes.

    >>> stratified(np.array([0, 0, 0, 0, 0, 0, 1, 1, 1]), 3, seed=0).shape
    (3,)
    """
    if len(labels_N) <= at_most:
        return np.arange(len(labels_N))
    classes, counts = np.unique(labels_N, return_counts=True)
    if at_most < len(classes):
        raise UserError(f"{at_most} images cannot stand for {len(classes)} classes")
    # Of largest remainders, after one for each class.
    exact = counts / len(labels_N) * at_most
    take = np.maximum(1, np.floor(exact)).astype(int)
    while take.sum() != at_most:
        step = 1 if take.sum() < at_most else -1
        wanting = step * (exact - take) - np.where((take + step < 1) | (take + step > counts), np.inf, 0)
        take[np.argmax(wanting)] += step
    rng = np.random.default_rng(seed)
    chosen = [
        rng.choice(np.flatnonzero(labels_N == one), count, replace=False)
        for one, count in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def some_of_each(labels_N: NDArray[np.integer], each: int, seed: int) -> NDArray[np.int64]:
    """Places of so many images of each class, drawn at random, class by class; all of a class that has fewer.

    >>> int(some_of_each(np.array([1, 0, 1, 1]), 1, seed=0)[0])
    1
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for one in np.unique(labels_N):
        places = np.flatnonzero(labels_N == one)
        chosen.append(rng.choice(places, min(each, len(places)), replace=False))
    return np.concatenate(chosen)
