"""Intervals of each class, by the same bootstrap over patients as those of the whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from medpretrain.evaluation.intervals import mean_over_units, of_units, percentile_interval, require_resamples
from medpretrain.evaluation.metrics import Scored
from medpretrain.report.figures_scores import units_at
from medpretrain.report.gather import Measured

RESAMPLES = 400
METRICS = ("sensitivity", "auroc", "aupr", "f1")

Bounds = dict[str, list[tuple[float, float]]]
"""By metric an interval a class."""


def class_intervals(one: Measured, fraction: float, resamples: int = RESAMPLES) -> Bounds:
    """95 % percentile intervals of the mean over units; nothing where too few patients have a class."""
    classes, units = one.evaluation.data.classes, units_at(one.evaluation, fraction)
    part = of_units(one.predictions, units)
    try:
        counts_BP, place_R = require_resamples(part.unit_R, part.patient_R, part.label_R, classes, resamples=resamples)
    except UserError:
        return {}
    totals = {metric: np.zeros((resamples, len(classes))) for metric in METRICS}
    for number, share in mean_over_units(units).items():
        rows = np.flatnonzero(part.unit_R == number)
        scored = Scored(part.scores_RK[rows], part.label_R[rows])
        weights = counts_BP[:, place_R[rows]].astype(np.float64)
        for metric, values in _by_class(scored, weights, len(classes)).items():
            totals[metric] += share * values
    return {
        metric: [(bounds.low, bounds.high) for bounds in map(percentile_interval, value_BK.T)]
        for metric, value_BK in totals.items()
    }


def _by_class(scored: Scored, weights_BN: NDArray[np.float64], K: int) -> dict[str, NDArray[np.float64]]:
    confusion = scored.confusion(weights_BN)
    hit, truly, picked = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1)
    ranked = [scored.ranked(k, weights_BN) for k in range(K)]
    return {
        "sensitivity": hit / truly,
        "auroc": np.stack([auroc for auroc, _ in ranked], axis=1),
        "aupr": np.stack([aupr for _, aupr in ranked], axis=1),
        "f1": 2 * hit / (truly + picked),
    }
