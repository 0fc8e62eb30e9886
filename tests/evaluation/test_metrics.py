from __future__ import annotations

import secrets

import numpy as np
import pytest

from data_prep.errors import UserError
from medpretrain.evaluation.metrics import metrics


def auroc_by_pairs(positive: np.ndarray, score: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order, equal scores counting half."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p in score[positive].tolist() for n in score[~positive].tolist()
    ]
    return sum(wins) / len(wins)


def average_precision_by_thresholds(positive: np.ndarray, score: np.ndarray) -> float:
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        picked = score >= threshold
        hits = int((picked & positive).sum())
        recall = hits / int(positive.sum())
        total += (recall - recall_before) * hits / int(picked.sum())
        recall_before = recall
    return total


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("levels", [4, 10**6])
def test_metrics_equal_plain_loops_with_and_without_ties(n_classes: int, levels: int) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, 60)])
    scores = rng.integers(0, levels, (len(labels), n_classes)) / levels
    measured = metrics(scores, labels, [f"c{k}" for k in range(n_classes)])
    of_auroc = [1] if n_classes == 2 else range(n_classes)
    assert measured.auroc == pytest.approx(np.mean([auroc_by_pairs(labels == k, scores[:, k]) for k in of_auroc]))
    assert measured.aupr == pytest.approx(
        np.mean([average_precision_by_thresholds(labels == k, scores[:, k]) for k in range(n_classes)])
    )
    picked = [max(range(n_classes), key=lambda k: row[k]) for row in scores.tolist()]
    assert measured.accuracy == pytest.approx(np.mean([p == y for p, y in zip(picked, labels, strict=True)]))


def test_scores_that_say_nothing_give_one_half() -> None:
    labels = np.array([0, 1, 1, 2])
    assert metrics(np.full((4, 3), 1 / 3), labels, ["a", "b", "c"]).auroc == 0.5


def test_auroc_of_two_classes_is_that_of_class_1() -> None:
    scores = np.array([[0.9, 0.1], [0.9, 0.2], [0.9, 0.0]])
    assert metrics(scores, np.array([0, 1, 0]), ["normal", "lesion"]).auroc == 1.0


def test_a_class_missing_in_the_labels_is_named() -> None:
    with pytest.raises(UserError, match="'knee', 'spine'"):
        metrics(np.eye(4), np.array([0, 1, 1, 0]), ["abd", "lung", "knee", "spine"])


def test_a_single_class_is_refused() -> None:
    with pytest.raises(UserError, match="two classes"):
        metrics(np.ones((2, 1)), np.array([0, 0]), ["only"])


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="finite"):
        metrics(np.array([[np.nan, 1.0], [0.0, 1.0]]), np.array([0, 1]), ["a", "b"])
