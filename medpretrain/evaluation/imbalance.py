"""How unevenly the classes of a training set are filled: the measures of AMIMV-SSL's Table 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError

# Ours; see `imbalance`.
IMBALANCED_RATIO = 7.0
BALANCED_RATIO = 2.0
SUFFICIENT_SHARE = 5.0
SUFFICIENT_IMAGES = 10_000


class Imbalance(BaseModel):
    """Of the training images of each class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: list[str]
    counts: list[int]
    imbalance_ratio: float
    """IR: largest / smallest."""
    coefficient_of_variation: float
    """CV: standard deviation (ddof 1) / mean."""
    normalized_entropy: float
    """NE: 1 for equal counts."""
    gini: float
    """0 for equal counts."""
    rare_class_ratio: float
    """RCR: smallest / all, percent."""
    category: Literal["FB", "PI", "I"]
    """Fairly balanced, partially imbalanced, imbalanced."""


def imbalance(counts: Sequence[int], classes: Sequence[str]) -> Imbalance:
    """The measures of imbalance of Table 1 of AMIMV-SSL, and its class.

    With n_k images of class k of K, N in all, p_k = n_k / N:

        IR = max n_k / min n_k             CV = sqrt(sum (n_k - N/K)^2 / (K - 1)) / (N/K)
        NE = -sum p_k log p_k / log K      GI = sum over i, j of |n_i - n_j| / (2 K N)      RCR = 100 min p_k

    The table prints two decimals, cut and not rounded; all five measures follow it so for the public counts.

    The paper gives no thresholds for the class. These are ours, derived from the table: the simplest that give all of
    its eleven datasets their class.

        I   where IR >= 7                             (table: I from 7.36, others up to 5.93)
        FB  else, where RCR >= 5 and N >= 10,000      (FB from 7.09 and 11,959; PI up to 4.58, or up to 4,708 images)
        PI  else

    Size has a part in it because the paper's has ("minority class sufficiency"): BreastMNIST, 147 and 399 images, is PI
    and BloodMNIST, of a higher IR and lower RCR, FB. One rule is not asked for by the table: IR < 2 is FB at any size,
    so that equal counts are never called imbalanced.

    Raises:
        UserError: fewer than two classes; a class without an image.

    >>> measured = imbalance([147, 399], ["malignant", "benign"])
    >>> round(measured.imbalance_ratio, 2), round(measured.gini, 2), measured.category
    (2.71, 0.23, 'PI')
    """
    assert len(counts) == len(classes), f"{len(counts)} counts of {len(classes)} classes"
    if len(counts) < 2:
        raise UserError(f"imbalance is between at least two classes; there are {len(counts)}")
    empty = [repr(name) for name, count in zip(classes, counts, strict=True) if count < 1]
    if empty:
        raise UserError(f"no training image of class {', '.join(empty)}: its imbalance has no measure; leave it out")
    n = np.array(sorted(counts), np.float64)
    K, total = len(n), n.sum()
    share = n / total
    ratio, rarest = float(n[-1] / n[0]), float(100 * share[0])
    # Sorted, the sum over pairs needs each count once: as the larger of i pairs and the smaller of K - 1 - i.
    pairs = float(((2 * np.arange(K) - (K - 1)) * n).sum())
    return Imbalance(
        classes=list(classes),
        counts=[int(count) for count in counts],
        imbalance_ratio=ratio,
        coefficient_of_variation=float(n.std(ddof=1) / n.mean()),
        normalized_entropy=min(1.0, float(-(share * np.log(share)).sum() / np.log(K))),
        gini=pairs / (K * total),
        rare_class_ratio=rarest,
        category=_category(ratio, rarest, int(total)),
    )


def _category(ratio: float, rarest: float, total: int) -> Literal["FB", "PI", "I"]:
    if ratio >= IMBALANCED_RATIO:
        return "I"
    if ratio < BALANCED_RATIO or (rarest >= SUFFICIENT_SHARE and total >= SUFFICIENT_IMAGES):
        return "FB"
    return "PI"
