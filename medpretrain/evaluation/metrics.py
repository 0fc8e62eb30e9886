"""What class scores are worth: one definition of each metric, for one set of images or thousands of resamples.

Refused, not shortened, where a class is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError, nearest
from medpretrain.evaluation.ranking import Ranking


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

BINS = 15
"""Of equal width, of the expected calibration error (Guo et al. 2017)."""

MEDMNIST_TASKS = ("multi-class", "binary-class", "multi-label, binary-class", "ordinal-regression")

# A row of scores may sum to this much more or less than 1: single precision over a thousand classes is within it.
_SUM_TOLERANCE = 1e-4


def metrics(scores_NK: NDArray[np.floating], labels_N: NDArray[np.integer], classes: Sequence[str]) -> Metrics:
    """How well the scores rank, pick and promise the classes.

    Picked is the class of the highest score, the first of equal ones. With t, f for right and wrong and p, n for
    picked as the class or not: sensitivity tp / (tp + fn), specificity tn / (tn + fp), precision tp / (tp + fp), F1
    2 tp / (2 tp + fp + fn). AUROC is that of class 1 for two classes, the unweighted mean of one-vs-rest for more;
    equal scores count half. AUPR is the unweighted mean over all classes, also of two, of average precision. Brier is
    the mean over images of the sum over classes of (score - truth)^2: Brier's own, for two classes twice the
    `brier_score_loss` of scikit-learn. ECE is the sum over 15 bins of the highest score of (part of the images) *
    |accuracy - mean highest score|; a bin holds (low, high], the first also 0.

    `medmnist.Evaluator` has the same AUROC for two classes ("binary-class", the last column) and for more
    ("multi-class"), and the same accuracy for more. For two classes it picks the second where its score is above 0.5:
    the same where scores sum to 1. `medmnist_metrics` has its definitions to the letter.

    Args:
        scores_NK: one probability an image and class; rows sum to 1.
        labels_N: from 0 to K - 1.
        classes: the K names, for messages and per class.

    Raises:
        UserError: a class without an image among the labels, fewer than two classes, scores that are not finite or not
            probabilities.

    >>> metrics(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]), ["normal", "lesion"]).auroc
    1.0
    """
    n_classes = len(classes)
    assert scores_NK.shape == (len(labels_N), n_classes), f"{scores_NK.shape} scores of {len(labels_N)} labels"
    require_all_classes(labels_N, classes, where="the labels")
    require_probabilities(scores_NK)
    ones = np.ones((1, len(labels_N)))
    prepared = Scored(scores_NK, labels_N)
    confusion = prepared.confusion(ones)[0]
    per_class = []
    for k, name in enumerate(classes):
        auroc, aupr = prepared.ranked(k, ones)
        hit, truly, picked = confusion[k, k], confusion[k].sum(), confusion[:, k].sum()
        others = len(labels_N) - truly
        per_class.append(
            ClassMetrics(
                name=name,
                n=int(truly),
                auroc=float(auroc[0]),
                aupr=float(aupr[0]),
                sensitivity=float(hit / truly),
                specificity=float((others - (picked - hit)) / others),
                precision=float(hit / picked) if picked else None,
                f1=float(2 * hit / (truly + picked)),
            )
        )
    return Metrics(
        **{name: float(value[0]) for name, value in prepared.scalars(ones).items()},
        per_class=per_class,
        confusion=confusion.astype(int).tolist(),
        calibration=prepared.calibration(),
    )


def scalars(scores_NK: NDArray[np.floating], labels_N: NDArray[np.integer]) -> dict[str, float]:
    """The `SCALARS` of `metrics` and nothing else, unchecked; NaN where a class is missing that one needs."""
    measured = Scored(scores_NK, labels_N).scalars(np.ones((1, len(labels_N))))
    return {name: float(value[0]) for name, value in measured.items()}


class Scored:
    """N scored images, sorted and compared once, so that any weights give the metrics in O(N) a row of them.

    Args:
        scores_NK: as `metrics` takes them; not checked here.
        labels_N: from 0 to K - 1; a class may be missing.
    """

    def __init__(self, scores_NK: NDArray[np.floating], labels_N: NDArray[np.integer]) -> None:
        self._labels_N = np.asarray(labels_N)
        self._K = scores_NK.shape[1]
        self._rankings = [Ranking(scores_NK[:, k], self._labels_N == k) for k in range(self._K)]
        picked_N = scores_NK.argmax(axis=1)
        self._right_N = (picked_N == self._labels_N).astype(np.float64)
        self._confidence_N = scores_NK.max(axis=1).astype(np.float64)
        self._squared_N = ((scores_NK.astype(np.float64) - np.eye(self._K)[self._labels_N]) ** 2).sum(axis=1)
        self._edges = np.linspace(0.0, 1.0, BINS + 1)
        # Left: a value on an edge belongs to the bin below it.
        self._bin_N = np.searchsorted(self._edges[1:-1], self._confidence_N, side="left")
        self._gap_NI = np.eye(BINS)[self._bin_N] * (self._right_N - self._confidence_N)[:, None]
        cell_N = self._labels_N.astype(np.int64) * self._K + picked_N
        self._by_cell_N = np.argsort(cell_N, kind="stable")
        self._cells, self._cell_starts = np.unique(cell_N[self._by_cell_N], return_index=True)

    def scalars(self, weights_BN: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
        """Each of `SCALARS`, (B,), each image counting as often as its weight says.

        NaN in a row without weight on a class, for the metrics that need it.
        """
        confusion = self.confusion(weights_BN)
        hit_BK = np.diagonal(confusion, axis1=1, axis2=2)
        truly_BK, picked_BK = confusion.sum(axis=2), confusion.sum(axis=1)
        total_B = truly_BK.sum(axis=1)
        others_BK = total_B[:, None] - truly_BK
        with np.errstate(invalid="ignore", divide="ignore"):
            sensitivity_BK = hit_BK / truly_BK
            specificity_BK = (others_BK - (picked_BK - hit_BK)) / others_BK
            f1_BK = np.where(truly_BK > 0, 2 * hit_BK / (truly_BK + picked_BK), np.nan)
        ranked = [self.ranked(k, weights_BN) for k in range(self._K)]
        of = slice(1, 2) if self._K == 2 else slice(None)
        return {
            "accuracy": hit_BK.sum(axis=1) / total_B,
            "balanced_accuracy": sensitivity_BK.mean(axis=1),
            "auroc": np.mean([auroc for auroc, _ in ranked[of]], axis=0),
            "aupr": np.mean([aupr for _, aupr in ranked], axis=0),
            "sensitivity": sensitivity_BK[:, of].mean(axis=1),
            "specificity": specificity_BK[:, of].mean(axis=1),
            "f1": f1_BK[:, of].mean(axis=1),
            "brier": weights_BN @ self._squared_N / total_B,
            "ece": np.abs(weights_BN @ self._gap_NI).sum(axis=1) / total_B,
        }

    def ranked(self, k: int, weights_BN: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUROC and average precision of class k against all others, each (B,)."""
        return self._rankings[k].auroc_and_precision(weights_BN)

    def confusion(self, weights_BN: NDArray[np.floating]) -> NDArray[np.float64]:
        """(B, K, K), weight of each true (rows) and picked (columns) class."""
        counts = np.zeros((len(weights_BN), self._K * self._K))
        counts[:, self._cells] = np.add.reduceat(weights_BN[:, self._by_cell_N], self._cell_starts, axis=1)
        return counts.reshape(-1, self._K, self._K)

    def calibration(self) -> list[CalibrationBin]:
        """All bins, of unweighted images."""
        bins = []
        for number in range(BINS):
            inside = self._bin_N == number
            n = int(inside.sum())
            bins.append(
                CalibrationBin(
                    low=float(self._edges[number]),
                    high=float(self._edges[number + 1]),
                    n=n,
                    confidence=float(self._confidence_N[inside].mean()) if n else None,
                    accuracy=float(self._right_N[inside].mean()) if n else None,
                )
            )
        return bins


def medmnist_metrics(scores: NDArray[np.floating], labels: NDArray[np.integer], task: str) -> tuple[float, float]:
    """AUC and ACC as `medmnist.Evaluator` defines them (`getAUC`, `getACC` of medmnist 3).

    - "multi-class", "ordinal-regression": mean AUROC of one-vs-rest, also of two classes; accuracy of the highest
      score.
    - "binary-class": AUROC of the last column; accuracy of (last column > 0.5).
    - "multi-label, binary-class": both the mean over labels, accuracy of (score > 0.5).

    Where it and `metrics` agree: see there. Only here: labels that do not exclude each other, and scores that are no
    probabilities. Where medmnist gives NaN, a class or label that occurs in no image or in all, this refuses.

    Args:
        scores: (N, K); also (N,) or (N, 1) for "binary-class".
        labels: (N,) or (N, 1); (N, L) zeros and ones for several labels.
        task: of the dataset.

    Raises:
        UserError: an unknown task; a class or label that cannot be ranked; scores that are not finite.

    >>> medmnist_metrics(np.array([0.2, 0.9, 0.4]), np.array([[0], [1], [1]]), "binary-class")
    (1.0, 0.6666666666666666)
    """
    if task not in MEDMNIST_TASKS:
        raise UserError(f"MedMNIST has no task {task!r}{nearest(task, MEDMNIST_TASKS)}")
    _require_finite(scores)
    scores = scores.reshape(len(scores), -1)
    labels = labels.reshape(len(labels), -1)
    if task == "multi-label, binary-class":
        assert labels.shape == scores.shape, f"{scores.shape} scores of {labels.shape} labels"
        truth = labels == 1
        accuracy = float(np.mean((scores > 0.5) == truth))
    else:
        assert labels.shape == (len(scores), 1), f"{scores.shape} scores of {labels.shape} labels"
        if task == "binary-class":
            scores, truth = scores[:, -1:], labels == 1
            accuracy = float(np.mean((scores > 0.5) == truth))
        else:
            truth = labels == np.arange(scores.shape[1])
            accuracy = float(np.mean(scores.argmax(axis=1) == labels[:, 0]))
    unranked = [str(k) for k in range(truth.shape[1]) if truth[:, k].all() or not truth[:, k].any()]
    if unranked:
        raise UserError(f"no AUC: column {', '.join(unranked)} of the labels is true of no image or of all")
    ones = np.ones((1, len(scores)))
    ranked = [Ranking(scores[:, k], truth[:, k]).auroc_and_precision(ones)[0][0] for k in range(truth.shape[1])]
    return float(np.mean(ranked)), accuracy


def require_probabilities(scores_NK: NDArray[np.floating]) -> None:
    """Refuse scores that Brier and ECE have no meaning for.

    Raises:
        UserError: scores that are not finite, outside of 0 to 1, or that do not sum to 1 over the classes.
    """
    _require_finite(scores_NK)
    off_N = np.abs(scores_NK.sum(axis=1, dtype=np.float64) - 1)
    if scores_NK.size and (scores_NK.min() < 0 or off_N.max() > _SUM_TOLERANCE):
        worst = int(off_N.argmax() if scores_NK.min() >= 0 else scores_NK.min(axis=1).argmin())
        raise UserError(
            f"the class scores are no probabilities: those of image {worst} are {_short(scores_NK[worst])}; "
            "they must be 0 or more and sum to 1"
        )


def _require_finite(scores: NDArray[np.floating]) -> None:
    if not np.isfinite(scores).all():
        raise UserError("the class scores hold values that are not finite")


def _short(values: NDArray[np.floating]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4].tolist()) + (", ..." if len(values) > 4 else "")


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
