"""Contrast with a few positives of the class (KCL), and a pull to fixed places of the classes (TSC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

from medpretrain.losses.contrastive import Pairs, contrastive_loss, unit

_TEMPERATURE = 0.07
"""Of the targets' mutual repulsion."""
_ITERATIONS = 500
"""Enough to converge for a few hundred targets; for 1000 in 128 dimensions 0.2 % above the optimum, in 15 s."""


@dataclass(frozen=True)
class Targets:
    """Where the classes are pulled to.

    Attributes:
        embeddings_CD: a target for each class.
        labels_A: the class of each anchor, -1 where unknown: such an anchor is pulled to none.
        weight: lambda >= 0; the paper's 0.2.
    """

    embeddings_CD: Tensor
    labels_A: Tensor
    weight: float


def sample_positives(own_A: Tensor, labels_K: Tensor, draws_AP: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor up to P different keys of its class, other than its own; all such sets are equally likely.

    Args:
        own_A: the place of each anchor's own key, which shows the same image and has its label.
        labels_K: class ids of the keys, -1 where unknown; an anchor of unknown class has no sampled positives.
        draws_AP: uniform in [0, 1), independent; in float64, or large classes would be sampled unevenly.

    Returns:
        The keys' places (A, P) int64, and a mask (A, P) of those that there are: the first ones of each row. The other
        places are of some key.

    >>> places, mask = sample_positives(torch.tensor([0, 1]), torch.tensor([7, 5, 7]), torch.zeros(2, 2))
    >>> places[mask].tolist(), mask.tolist()
    ([2], [[True, False], [False, False]])
    """
    sorted_K, key_of_rank_K = labels_K.sort(stable=True)
    rank_of_key_K = torch.empty_like(key_of_rank_K)
    rank_of_key_K[key_of_rank_K] = torch.arange(len(labels_K), device=labels_K.device)
    labels_A = labels_K[own_A]
    first_A = torch.searchsorted(sorted_K, labels_A)
    others_A = torch.searchsorted(sorted_K, labels_A, right=True) - first_A - 1
    others_A = others_A.masked_fill(labels_A < 0, 0)
    taken = [rank_of_key_K[own_A] - first_A]  # ranks within the class
    for draw_A in draws_AP.unbind(dim=1):
        left_A = (others_A - len(taken) + 1).clamp(min=1)
        rank_A = (draw_A * left_A).long().minimum(left_A - 1)  # the product may be rounded up
        # The n-th of those that are left: each taken one before it shifts it by one.
        for before_A in torch.stack(taken).sort(dim=0).values:
            rank_A = rank_A + (rank_A >= before_A)
        taken.append(rank_A)
    ranks_AP = torch.stack(taken, dim=1)[:, 1:] + first_A[:, None]
    count = draws_AP.shape[1]
    mask_AP = torch.arange(count, device=own_A.device) < others_A[:, None]
    return key_of_rank_K[ranks_AP.clamp(max=len(labels_K) - 1)], mask_AP


def kcl(
    queries_AD: Tensor,
    keys: Tensor | Sequence[Tensor],
    own_A: Tensor,
    positives_AP: Tensor,
    mask_AP: Tensor,
    *,
    temperature: float,
    targets: Targets | None = None,
) -> Tensor:
    """KCL: the mean over queries of -1/(k + 1) sum_p log softmax_p, p being the own key and k others of its class.

    The loss of Kang et al. 2021; with targets that of TSC (Li et al. 2022), which adds -lambda log softmax of the
    class's target, all targets being in the denominator too.

    Args:
        queries_AD, keys: embeddings, any scale. Several tensors of keys (batch, queue) stand one after another; all of
            them are in the denominator.
        own_A: the place of each query's own key.
        positives_AP, mask_AP: as `sample_positives` gives them. k is the number that there are, P or fewer.
        temperature: T > 0; the papers' 0.07.
        targets: of TSC.

    Raises:
        ValueError: a temperature that is not positive.

    >>> alike, own, none = torch.ones(3, 2), torch.arange(3), torch.zeros(3, 0, dtype=torch.int64)
    >>> round(kcl(alike, alike, own, none, none.bool(), temperature=0.07).item(), 4)  # log 3
    1.0986
    """
    parts = [keys] if isinstance(keys, Tensor) else list(keys)
    weight = torch.cat([torch.ones_like(own_A)[:, None], mask_AP], dim=1).double()
    weight /= weight.sum(dim=1, keepdim=True)
    place = torch.cat([own_A[:, None], positives_AP], dim=1)
    if targets is not None:
        known = targets.labels_A >= 0
        target = sum(len(part) for part in parts) + targets.labels_A.clamp(min=0)
        place = torch.cat([place, target[:, None]], dim=1)
        weight = torch.cat([weight, targets.weight * known[:, None].double()], dim=1)
        parts.append(targets.embeddings_CD)
    return contrastive_loss(queries_AD, parts, lambda rows: Pairs(weight[rows], place[rows]), temperature=temperature)


def uniform_targets(count: int, width: int, seed: int) -> Tensor:
    """C points of the unit sphere, as far apart as they can be: (C, D) float64, a function of the arguments.

    They minimise 1/C sum_i log sum_j exp(t_i . t_j / T), equation 3 of Li et al. 2022, with the T of their code. Up
    to D + 1 points are a simplex, the exact minimum; more are found by L-BFGS from random ones, which may end in a
    local minimum.

    Args:
        count: C >= 2.
        width: D >= 1.
        seed: of the simplex's rotation, or of the random points.

    Raises:
        ValueError: fewer than two points.

    >>> t = uniform_targets(3, 8, seed=0)
    >>> [round(value, 6) for value in (t @ t.T)[0].tolist()]
    [1.0, -0.5, -0.5]
    """
    if count < 2:
        raise ValueError(f"targets are for at least two classes, not {count}")
    draw = torch.Generator().manual_seed(seed)
    if count > width + 1:
        start = torch.randn(count, width, generator=draw, dtype=torch.float64)
        return torch.from_numpy(_spread(unit(start).numpy()))
    # One-hot rows less their mean span C - 1 dimensions, which are laid along random directions.
    corners = torch.eye(count, dtype=torch.float64) - 1 / count
    span = torch.linalg.qr(corners[:, :-1]).Q
    directions = torch.linalg.qr(torch.randn(width, count - 1, generator=draw, dtype=torch.float64)).Q
    return unit(corners @ span @ directions.T)


def match(centres_CD: Tensor, targets_CD: Tensor) -> Tensor:
    """Which target each class gets, a permutation (C,) int64 on the CPU, so that the sum of distances is the least.

    The matching of Li et al. 2022, by the Hungarian algorithm. A centre at the origin is as far from every target, so
    it takes what the others leave.
    """
    distances = torch.cdist(centres_CD.double(), targets_CD.double(), compute_mode="donot_use_mm_for_euclid_dist")
    _, target_of_class = linear_sum_assignment(distances.cpu().numpy())
    return torch.from_numpy(target_of_class)


def _spread(start_CD: NDArray[np.float64]) -> NDArray[np.float64]:
    shape = start_CD.shape

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Equation 3 less its constant 1/T, the share of j = i, beside which the rest would be lost to rounding."""
        x = flat.reshape(shape)
        length = np.linalg.norm(x, axis=1, keepdims=True)
        t = x / length
        near = np.exp((t @ t.T - 1) / _TEMPERATURE)
        np.fill_diagonal(near, 0)
        total = near.sum(axis=1, keepdims=True)
        share = near / (1 + total)
        slope = (share + share.T) @ t / (len(t) * _TEMPERATURE)
        slope -= (slope * t).sum(axis=1, keepdims=True) * t
        return float(np.log1p(total).mean()), (slope / length).ravel()

    scale = objective(start_CD.ravel())[0]  # tolerances are parts of it

    def scaled(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, slope = objective(flat)
        return value / scale, slope / scale

    found = minimize(
        scaled,
        start_CD.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _ITERATIONS, "ftol": 1e-12, "gtol": 1e-9},
    )
    points: NDArray[np.float64] = found.x.reshape(shape)
    return points / np.linalg.norm(points, axis=1, keepdims=True)
