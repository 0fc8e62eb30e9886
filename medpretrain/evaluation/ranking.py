"""AUROC and average precision of one score, for many sets of image weights at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Ranking:
    """N images in the order of the score of one class, sorted once, so that each set of weights costs O(N).

    A weight says how often an image counts: 1 for each is the plain metric, a patient's multiplicity that of a
    bootstrap resample. Both metrics see the score only through this order.

    Args:
        score_N: higher is likelier.
        positive_N: which images are of the class.
    """

    def __init__(self, score_N: NDArray[np.floating], positive_N: NDArray[np.bool_]) -> None:
        self._order_N = np.argsort(-score_N, kind="stable")
        ordered, positive = score_N[self._order_N], positive_N[self._order_N]
        # Equal scores are one group, from start to end: no threshold lies between them.
        first_N = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
        bounds = np.append(np.flatnonzero(first_N), len(ordered))
        group_N = np.cumsum(first_N) - 1
        self._at_P = np.flatnonzero(positive)
        self._start_P, self._end_P = bounds[group_N[self._at_P]], bounds[group_N[self._at_P] + 1]
        positives_to = np.concatenate([[0], np.cumsum(positive)])
        self._positive_start_P, self._positive_end_P = positives_to[self._start_P], positives_to[self._end_P]

    def auroc_and_precision(self, weights_BN: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUROC and average precision of each of the B rows of weights, which are >= 0.

        AUROC is the weight of (positive, negative) pairs in the right order over that of all, equal scores counting
        half (Mann and Whitney). Average precision is the sum over thresholds of (recall step) * precision, without
        interpolation.

        Returns:
            Both (B,); NaN where a row has no weight on a positive (both) or on a negative image (AUROC).

        >>> ranking = Ranking(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
        >>> auroc, precision = ranking.auroc_and_precision(np.ones((1, 4)))
        >>> float(auroc[0]), round(float(precision[0]), 4)
        (0.875, 0.8333)
        """
        ordered_BN = weights_BN[:, self._order_N]
        weight_BP = ordered_BN[:, self._at_P]
        picked = _running(ordered_BN)
        hits = _running(weight_BP)
        positives_B, total_B = hits[:, -1], picked[:, -1]
        negatives_B = total_B - positives_B
        picked_BP, hits_BP = picked[:, self._end_P], hits[:, self._positive_end_P]
        # Twice the negatives above a positive, equal ones counting half.
        above_BP = picked_BP - hits_BP + picked[:, self._start_P] - hits[:, self._positive_start_P]
        precision_BP = np.divide(hits_BP, picked_BP, out=np.zeros_like(hits_BP), where=picked_BP > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            pairs_B = positives_B * negatives_B
            auroc_B = (pairs_B - 0.5 * np.einsum("bp,bp->b", weight_BP, above_BP)) / pairs_B
            average_B = np.einsum("bp,bp->b", weight_BP, precision_BP) / positives_B
        return auroc_B, average_B


def _running(weights_BN: NDArray[np.floating]) -> NDArray[np.float64]:
    """The sum of the weights before each place and after the last, (B, N + 1)."""
    sums = np.zeros((weights_BN.shape[0], weights_BN.shape[1] + 1))
    np.cumsum(weights_BN, axis=1, out=sums[:, 1:])
    return sums
