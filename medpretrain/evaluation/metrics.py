"""Accuracy, AUROC and AUPR of class scores; refused, not shortened, where a class is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import average_precision_score, roc_auc_score

from data_prep.errors import UserError


class ClassMetrics(BaseModel):
    """One class against all others; all from 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n: int
    """Images of it."""
    auroc: float
    aupr: float
    sensitivity: float
    """Of the images of the class, the part that is called so; also recall."""
    specificity: float
    precision: float | None
    """None where no image was called so."""
    f1: float


class CalibrationBin(BaseModel):
    """Images whose highest score lies in (low, high]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    n: int
    confidence: float | None
    """Mean of the highest score; None for no image."""
    accuracy: float | None


class Metrics(BaseModel):
    """All from 0 to 1, but for the Brier score (0 to 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: float
    balanced_accuracy: float
    """Mean sensitivity of the classes."""
    auroc: float
    aupr: float
    sensitivity: float
    """Of two classes that of the second, else the mean over classes; `specificity` and `f1` alike."""
    specificity: float
    f1: float
    brier: float
    """Mean over images of the sum over classes of (score - truth)^2."""
    ece: float
    """Expected calibration error: over 15 bins of the highest score."""
    per_class: list[ClassMetrics]
    confusion: list[list[int]]
    """Rows: true class; columns: the class of the highest score."""
    calibration: list[CalibrationBin]


SCALARS = ("accuracy", "balanced_accuracy", "auroc", "aupr", "sensitivity", "specificity", "f1", "brier", "ece")
"""The fields of `Metrics` that are one number."""


def metrics(scores_NK: NDArray[np.floating], labels_N: NDArray[np.integer], classes: Sequence[str]) -> Metrics:
    """How well the scores rank and pick the classes.

    Accuracy takes the class of the highest score (the first of equal ones). AUROC is that of class 1 for two classes,
    the unweighted mean of one-vs-rest for more; equal scores count half. AUPR is the unweighted mean over all classes
    of average precision, sum over thresholds of (recall step) * precision, without interpolation.

    Args:
        scores_NK: one score an image and class, higher is likelier.
        labels_N: from 0 to K - 1.
        classes: the K names, for messages.

    Raises:
        UserError: a class without an image among the labels, fewer than two classes, scores that are not finite.

    >>> metrics(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]), ["normal", "lesion"]).auroc
    1.0
    """
    assert scores_NK.shape == (len(labels_N), len(classes)), f"{scores_NK.shape} scores of {len(labels_N)} labels"
    require_all_classes(labels_N, classes, where="the labels")
    if not np.isfinite(scores_NK).all():
        raise UserError("the class scores hold values that are not finite")
    is_class = [labels_N == k for k in range(len(classes))]
    ranked = range(len(classes)) if len(classes) > 2 else [1]
    return Metrics(
        accuracy=float(np.mean(scores_NK.argmax(axis=1) == labels_N)),
        auroc=float(np.mean([roc_auc_score(is_class[k], scores_NK[:, k]) for k in ranked])),
        aupr=float(np.mean([average_precision_score(is_class[k], scores_NK[:, k]) for k in range(len(classes))])),
    )


def require_all_classes(labels_N: NDArray[np.integer], classes: Sequence[str], *, where: str) -> None:
    """Refuse labels in which a class does not occur: a result on the remaining classes would look like one on all.

    Raises:
        UserError: naming the missing classes, or fewer than two classes.
    """
    if len(classes) < 2:
        raise UserError(f"an evaluation needs at least two classes; there are {len(classes)}")
    assert labels_N.size == 0 or (labels_N.min() >= 0 and labels_N.max() < len(classes)), "a label out of range"
    counts = np.bincount(labels_N, minlength=len(classes))
    missing = [repr(name) for name, count in zip(classes, counts, strict=True) if count == 0]
    if missing:
        raise UserError(f"no image of class {', '.join(missing)} in {where}")
