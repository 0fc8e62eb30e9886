"""Classify an image by its nearest neighbours among the training images, weighted by similarity."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import UserError

# Similarities held at once by a core: 2 ** 25 in float32 are 128 MiB.
_CHUNK_ELEMENTS = 2**25
# Training features compared again at a time, in float64: on a CPU as many as its cache holds.
_AGAIN = {"cpu": 2**8, "cuda": 2**16}
_FEW = 2**8  # features converted at a time, so that they stay in the cache


def knn_scores(
    train_ND: Tensor,
    labels_N: Tensor,
    test_MD: Tensor,
    n_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.07,
) -> Tensor:
    """Class scores (M, n_classes), float64, each row summing to 1.

    Weighted kNN of Wu et al. 2018 (section 3.4), as DINO evaluates: of the k training images of the highest cosine
    similarity s, each votes for its class with weight exp(s / temperature). Of equally similar images at the k-th place
    the ones of the lower row are in; equal is what differs by no more than float64's own rounding, D * 2^-52.

    All similarities are taken in float32, once; those that could be among the k highest, whatever the rounding, are
    taken again in float64. So neighbours and votes are those of float64, and depend on no chunk size.

    Args:
        train_ND: training features, any scale.
        labels_N: their classes, from 0 to n_classes - 1.
        test_MD: test features, on the same device.
        n_classes: K.
        k: neighbours; more than N means all N.
        temperature: > 0.

    Raises:
        UserError: no training image, k or temperature not positive, features that are not finite.

    >>> knn_scores(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), 2, k=1)
    tensor([[1., 0.]], dtype=torch.float64)
    """
    if k < 1:
        raise UserError(f"kNN needs at least one neighbour; k is {k}")
    if not temperature > 0:
        raise UserError(f"the temperature of kNN must be positive; it is {temperature}")
    if not len(train_ND):
        raise UserError("kNN needs at least one training image")
    k = min(k, len(train_ND))
    scores_MK = torch.zeros(len(test_MD), n_classes, dtype=torch.float64, device=test_MD.device)
    search = _Search(train_ND, k)
    labels_N = labels_N.long()

    def score(test_MD: Tensor, scores_MK: Tensor) -> None:
        buffers = search.buffers(len(test_MD))
        rows = max(1, _CHUNK_ELEMENTS // len(train_ND))
        for test_mD, scores_mK in zip(test_MD.split(rows), scores_MK.split(rows), strict=True):
            similarity_mC, column_mC = search.candidates(test_mD, *buffers)
            weight_mC = _weights(similarity_mC, k, temperature, equal=train_ND.shape[1] * 2.0**-52)
            scores_mK.scatter_add_(1, labels_N[column_mC], weight_mC)

    _side_by_side(score, test_MD, scores_MK)
    return scores_MK / scores_MK.sum(dim=1, keepdim=True)


def _side_by_side(work: Callable[[Tensor, Tensor], None], test_MD: Tensor, scores_MK: Tensor) -> None:
    """On a CPU each core does all of the work for its part of the test images.

    To meet at each of many small steps would take longer than the steps, above all where others use the cores too.
    """
    if not len(test_MD):
        return
    threads = torch.get_num_threads() if test_MD.device.type == "cpu" else 1
    if threads == 1 or len(test_MD) < threads:
        work(test_MD, scores_MK)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, test_MD.tensor_split(threads), scores_MK.tensor_split(threads)))
    finally:
        torch.set_num_threads(threads)


class _Search:
    """For each test image the training images that may be among its k nearest.

    Column n of the N similarities stands in stripe n // W, at place n % W; eight stripes are a group. The k-th highest
    of the W maxima over all stripes is a lower bound of the k-th highest similarity, for k images reach it; about 8 k
    places make it a close one, also where the images of a class stand together. Then only the groups and places whose
    maximum reaches it are looked into.
    """

    def __init__(self, train_ND: Tensor, k: int) -> None:
        n, width = train_ND.shape
        self._k, self._train_ND = k, train_ND
        stripes = min(64, max(1, n // max(8 * k, 64)))  # 64 places at least: what is beyond n is in the last stripe
        self._group = 8 if stripes >= 8 else 1
        stripes -= stripes % self._group
        places = -(-n // stripes)
        self._beyond = stripes * places - n
        # Unit vectors of float32: an inner product errs by (D + 2) u at most, in whatever order it is added up, and
        # the rounding of either vector adds u (Higham 2002, eq. 3.5). Bound and candidate may both err; D + 16 covers
        # the sums below too. Where float32 products may be rounded further, float64 ones are taken.
        exact = torch.get_float32_matmul_precision() == "highest"
        dtype = torch.float32 if exact else torch.float64
        self._margin = 2 * (width + 16) * 2.0**-24
        unit_ND = torch.zeros(n + self._beyond, width, dtype=dtype, device=train_ND.device)
        norms = []
        for part, unit in zip(train_ND.split(_FEW), unit_ND[:n].split(_FEW), strict=True):
            double, norm = _unit(part)
            unit.copy_(double)
            norms.append(norm)
        self._norm_N = torch.cat(norms)
        self._stripes = unit_ND.view(stripes, places, width).unbind()

    def buffers(self, most: int) -> tuple[Tensor, Tensor]:
        """What `candidates` works in; fresh memory at each call would cost more than most of what is done in it."""
        stripes, places = len(self._stripes), len(self._stripes[0])
        rows = min(most, max(1, _CHUNK_ELEMENTS // len(self._train_ND)))
        similarity = self._stripes[0].new_empty(stripes * rows * places)
        return similarity, similarity.new_empty(stripes // self._group * rows * places)

    def candidates(self, test_mD: Tensor, similarity: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (m, C), float64, and columns (m, C), ascending; a row with fewer ends with -inf."""
        m, stripes, places = len(test_mD), len(self._stripes), len(self._stripes[0])
        unit_mD, _ = _unit(test_mD)
        rounded_mD = unit_mD.to(similarity.dtype)
        similarity = similarity[: stripes * m * places]
        groups = stripes // self._group
        highest_GmW = highest[: groups * m * places].view(groups, m, places)
        for number, (stripe_WD, one) in enumerate(zip(self._stripes, similarity.split(m * places), strict=True)):
            one_mW = one.view(m, places)
            torch.mm(rounded_mD, stripe_WD.T, out=one_mW)
            if self._beyond and number == stripes - 1:
                one_mW[:, -self._beyond :] = -torch.inf
            group_mW = highest_GmW[number // self._group]  # now, while the stripe is in the cache
            torch.maximum(group_mW if number % self._group else one_mW, one_mW, out=group_mW)
        floor_m = _kth_highest(highest_GmW.amax(dim=0), self._k) - self._margin
        found = _places(highest_GmW >= floor_m[:, None])
        if 4 * len(found) > highest_GmW.numel():  # few images, or most of them alike
            return self._all_again(unit_mD)
        group, inside = found // (m * places), found % (m * places)
        stripe_hg = group[:, None] * self._group + torch.arange(self._group, device=found.device)
        values_hg = similarity.take(stripe_hg * (m * places) + inside[:, None])
        hit = _places(values_hg >= floor_m[inside // places, None])
        inside = inside[hit // self._group]
        column = stripe_hg.view(-1)[hit] * places + inside % places
        numbers = (inside // places * (stripes * places) + column).sort().values
        row, column = numbers // (stripes * places), numbers % (stripes * places)
        count_m = torch.bincount(row, minlength=m)
        turn = torch.arange(len(row), device=row.device) - (count_m.cumsum(0) - count_m)[row]
        column_mC = column.new_zeros(m, int(count_m.max()))
        column_mC[row, turn] = column
        similarity_mC = self._again(unit_mD, column_mC)
        similarity_mC[torch.arange(column_mC.shape[1], device=row.device) >= count_m[:, None]] = -torch.inf
        return similarity_mC, column_mC

    def _again(self, unit_mD: Tensor, column_mC: Tensor) -> Tensor:
        """The similarities of chosen columns in float64; in few buffers, for fresh memory costs more than the rest."""
        (m, columns), width = column_mC.shape, unit_mD.shape[1]
        rows = min(m, max(1, _AGAIN[unit_mD.device.type] // columns))
        near = self._train_ND.new_empty(rows * columns, width)
        double = unit_mD.new_empty(rows, columns, width)
        parts = []
        for column_rC, unit_rD in zip(column_mC.split(rows), unit_mD.split(rows), strict=True):
            if len(column_rC) < rows:  # the last ones
                near, double = near[: column_rC.numel()], double[: len(column_rC)]
            torch.index_select(self._train_ND, 0, column_rC.reshape(-1), out=near)
            double.copy_(near.view_as(double))
            parts.append(torch.bmm(double, unit_rD.unsqueeze(2)))
        return torch.cat(parts).squeeze(2) / self._norm_N[column_mC]

    def _all_again(self, unit_mD: Tensor) -> tuple[Tensor, Tensor]:
        parts = [unit_mD @ part.double().T for part in self._train_ND.split(_FEW)]
        similarity_mN = torch.cat(parts, dim=1) / self._norm_N
        return similarity_mN, torch.arange(len(self._norm_N), device=unit_mD.device).expand_as(similarity_mN)


def _weights(similarity_mC: Tensor, k: int, temperature: float, *, equal: float) -> Tensor:
    """exp(s / temperature) of the k highest of each row, of equal ones the first; 0 elsewhere."""
    last_m1 = similarity_mC.topk(k, dim=1).values[:, -1:]
    above = similarity_mC > last_m1 + equal
    tied = (similarity_mC >= last_m1 - equal) & ~above
    places_m1 = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= places_m1))
    # Relative to the best neighbour: the same after normalisation, and no overflow at a small temperature.
    best_m1 = similarity_mC.amax(dim=1, keepdim=True)
    return torch.where(chosen, ((similarity_mC - best_m1) / temperature).exp(), 0.0)


def _unit(features_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Features of length 1 (n, D) and their lengths before (n,), float64; without length they are similar to nothing.

    Raises:
        UserError: they are not finite.
    """
    double_nD = features_nD.double()
    norm_n = torch.linalg.vector_norm(double_nD, dim=1).clamp_min(1e-12)
    if not torch.isfinite(norm_n).all():
        raise UserError("the features hold values that are not finite")
    return double_nD / norm_n[:, None], norm_n


def _places(mask: Tensor) -> Tensor:
    """Where a mask is true, in the flattened mask."""
    if mask.device.type != "cpu":
        return mask.view(-1).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # many times faster than torch's


def _kth_highest(values_mW: Tensor, k: int) -> Tensor:
    if values_mW.device.type != "cpu":
        return values_mW.topk(k, dim=1).values[:, -1]
    place = values_mW.shape[1] - k
    return torch.from_numpy(np.partition(values_mW.numpy(), place, axis=1)[:, place].copy())
