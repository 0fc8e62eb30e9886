"""A linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from data_prep.errors import UserError
from medpretrain.evaluation.logistic import Optimum, Regression

DEFAULT_C = 1.0
_TO_CHOOSE = 1e-5
"""The gradient at which a C is judged by its cross-entropy on val; the one that is taken is then fitted to its end."""
_ENOUGH = 2  # strengths in a row that do worse: a weaker penalty only costs more
GRID = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class LinearProbe:
    """Class scores of the test images and how they came about."""

    scores: NDArray[np.float64]
    """(M, K), each row summing to 1."""
    C: float
    """The inverse strength of the L2 penalty, as in scikit-learn."""
    chosen_on: str
    """"val" if C was chosen there, "default" if there was no such split."""
    iterations: int
    """Newton steps."""
    converged: bool
    """Whether `gradient` is at most `logistic.TOLERANCE`; the scores are then right to 1e-6 or better."""
    gradient: float
    """The largest absolute entry of the gradient of the mean loss at these weights."""


def linear_scores(
    train_ND: NDArray[np.floating],
    labels_N: NDArray[np.integer],
    test_MD: NDArray[np.floating],
    n_classes: int,
    *,
    val: tuple[NDArray[np.floating], NDArray[np.integer]] | None = None,
) -> LinearProbe:
    """Fit on the training images, score the test images; deterministic.

    Features are standardised by the training images' mean and deviation. With `val` the C of GRID with the lowest
    cross-entropy there is taken (the smaller of equals), tried from the smallest until two in a row do worse; without,
    C = 1. The test images choose nothing.

    Args:
        train_ND: training features.
        labels_N: their classes; every one of 0 to n_classes - 1 occurs.
        test_MD: test features.
        n_classes: K >= 2.
        val: features (V, D) and labels (V,) of the val split.

    Raises:
        UserError: features that are not finite, an empty val split.

    >>> x = np.array([[-1.0], [1.0]])
    >>> linear_scores(x, np.array([0, 1]), x, 2).scores.argmax(axis=1).tolist()
    [0, 1]
    """
    assert set(np.unique(labels_N)) == set(range(n_classes)), "a class is missing in the training labels"
    named = {"train": train_ND, "test": test_MD} | ({"val": val[0]} if val else {})
    for split, features in named.items():
        if not np.isfinite(features).all():
            raise UserError(f"the features of {split} hold values that are not finite")
    scaler = StandardScaler().fit(train_ND.astype(np.float64))
    train = scaler.transform(train_ND.astype(np.float64))
    test = scaler.transform(test_MD.astype(np.float64))
    regression = Regression(train, labels_N, n_classes)
    chosen, best = DEFAULT_C, None
    if val is None:
        best = regression.fit(DEFAULT_C)
    else:
        if not len(val[1]):
            raise UserError("the val split has no labelled image to choose C on")
        held_out = scaler.transform(val[0].astype(np.float64))
        lowest, fitted, risen = np.inf, None, 0
        for c in sorted(GRID):  # each starts from the one before, which is near
            fitted = regression.fit(c, fitted, tolerance=_TO_CHOOSE)
            loss = log_loss(val[1], fitted.scores(held_out), labels=range(n_classes))
            if loss < lowest:
                chosen, best, lowest, risen = c, fitted, loss, 0
            else:
                risen += 1
            if risen == _ENOUGH:
                break
        best = regression.fit(chosen, best)
    assert isinstance(best, Optimum)
    return LinearProbe(
        scores=best.scores(test),
        C=chosen,
        chosen_on="val" if val else "default",
        iterations=best.iterations,
        converged=best.converged,
        gradient=best.gradient,
    )
