from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest
from medmnist import INFO, Evaluator
from sklearn import metrics as reference

from data_prep.errors import UserError
from medpretrain.evaluation.metrics import BINS, SCALARS, Scored, medmnist_metrics, metrics, scalars


def drawn(n_classes: int, levels: int, n: int = 80) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Probabilities, of few distinct values where levels are few, and labels that hold every class."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n)])
    scores = rng.integers(1, levels + 1, (len(labels), n_classes)).astype(float)
    scores[np.arange(len(labels)), labels] += 0.3 * levels * rng.integers(0, 2, len(labels))
    return scores / scores.sum(axis=1, keepdims=True), labels, rng


def names(n_classes: int) -> list[str]:
    return [f"c{k}" for k in range(n_classes)]


def auroc_by_pairs(positive: np.ndarray, score: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order, equal scores counting half."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p in score[positive].tolist() for n in score[~positive].tolist()
    ]
    return sum(wins) / len(wins)


def ece_by_loops(scores: np.ndarray, labels: np.ndarray) -> float:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        place = next(b for b in range(BINS) if confidence <= np.linspace(0, 1, BINS + 1)[b + 1])
        bins[place].append((confidence, row.index(confidence) == label))
    return sum(abs(sum(right for _, right in held) - sum(c for c, _ in held)) for held in bins) / len(labels)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_metrics_equal_scikit_learn_with_and_without_ties(n_classes: int, levels: int) -> None:
    scores, labels, _ = drawn(n_classes, levels)
    measured = metrics(scores, labels, names(n_classes))
    picked = scores.argmax(axis=1)
    one_hot = np.eye(n_classes)[labels]
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, picked, labels=range(n_classes), zero_division=np.nan
    )
    f1 = reference.f1_score(labels, picked, average=None, labels=range(n_classes), zero_division=0)
    specificity = [reference.recall_score(labels != k, picked != k) for k in range(n_classes)]
    auroc = [reference.roc_auc_score(labels == k, scores[:, k]) for k in range(n_classes)]
    aupr = [reference.average_precision_score(labels == k, scores[:, k]) for k in range(n_classes)]
    of = [1] if n_classes == 2 else list(range(n_classes))
    expected = {
        "accuracy": reference.accuracy_score(labels, picked),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, picked),
        "auroc": np.mean([auroc[k] for k in of]),
        "aupr": np.mean(aupr),
        "sensitivity": np.mean(recall[of]),
        "specificity": np.mean([specificity[k] for k in of]),
        "f1": np.mean(f1[of]),
        "brier": np.mean(((scores - one_hot) ** 2).sum(axis=1)),
        "ece": ece_by_loops(scores, labels),
    }
    assert set(expected) == set(SCALARS)
    assert {name: getattr(measured, name) for name in SCALARS} == pytest.approx(expected, abs=1e-12, rel=0)
    assert scalars(scores, labels) == pytest.approx(expected, abs=1e-12, rel=0)
    assert measured.confusion == reference.confusion_matrix(labels, picked).tolist()
    for k, one in enumerate(measured.per_class):
        found = (one.auroc, one.aupr, one.sensitivity, one.specificity, one.f1)
        assert found == pytest.approx((auroc[k], aupr[k], recall[k], specificity[k], f1[k]), abs=1e-12, rel=0)
        assert (one.name, one.n) == (f"c{k}", support[k])
        assert one.precision is None if np.isnan(precision[k]) else one.precision == pytest.approx(precision[k])


def test_brier_of_two_classes_is_twice_that_of_scikit_learn() -> None:
    scores, labels, _ = drawn(2, 10**6)
    assert metrics(scores, labels, names(2)).brier == pytest.approx(
        2 * reference.brier_score_loss(labels, scores[:, 1]), abs=1e-12
    )


@pytest.mark.parametrize("levels", [2, 10**6])
def test_auroc_counts_pairs_and_equal_scores_half(levels: int) -> None:
    scores, labels, _ = drawn(3, levels)
    expected = np.mean([auroc_by_pairs(labels == k, scores[:, k]) for k in range(3)])
    assert metrics(scores, labels, names(3)).auroc == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_a_weight_is_the_image_that_often(n_classes: int, levels: int) -> None:
    scores, labels, rng = drawn(n_classes, levels)
    weights = rng.integers(0, 4, (7, len(labels)))
    weights[:, :n_classes] = 1
    together = Scored(scores, labels).scalars(weights.astype(float))
    for b, times in enumerate(weights):
        copied = metrics(np.repeat(scores, times, axis=0), np.repeat(labels, times), names(n_classes))
        expected = {name: getattr(copied, name) for name in SCALARS}
        assert {name: together[name][b] for name in SCALARS} == pytest.approx(expected, abs=1e-12, rel=0)


def test_weights_without_a_class_give_nan_where_it_is_needed_and_no_number() -> None:
    scores, labels, _ = drawn(3, 10**6)
    measured = Scored(scores, labels).scalars((labels != 2).astype(float)[None])
    lost = {name for name in SCALARS if np.isnan(measured[name][0])}
    assert lost == {"balanced_accuracy", "auroc", "aupr", "sensitivity", "f1"}


def test_calibration_bins_hold_their_upper_edge_and_give_the_error() -> None:
    low, high = np.linspace(0, 1, BINS + 1)[[9, 10]]
    confidence = np.array([high, np.nextafter(high, 1), high, low, 1.0])
    scores = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 0, 1, 1, 0])
    measured = metrics(scores, labels, names(2))
    assert [(b, held.n) for b, held in enumerate(measured.calibration) if held.n] == [(8, 1), (9, 2), (10, 1), (14, 1)]
    assert (measured.calibration[9].confidence, measured.calibration[9].accuracy) == (pytest.approx(high), 0.5)
    assert measured.calibration[0].confidence is None
    assert measured.calibration[0].accuracy is None
    error = sum(held.n / 5 * abs(held.accuracy - held.confidence) for held in measured.calibration if held.n)
    assert measured.ece == pytest.approx(error, abs=1e-12)


def test_scores_that_say_nothing_give_one_half() -> None:
    labels = np.array([0, 1, 1, 2])
    assert metrics(np.full((4, 3), 1 / 3), labels, ["a", "b", "c"]).auroc == 0.5


def test_of_two_classes_the_second_is_the_positive_one() -> None:
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.7, 0.3]])
    measured = metrics(scores, np.array([0, 1, 1, 1]), ["normal", "lesion"])
    assert (measured.sensitivity, measured.specificity) == (pytest.approx(1 / 3), 1.0)
    assert (measured.auroc, measured.f1) == (1.0, 0.5)


def test_a_class_nothing_was_called_has_no_precision() -> None:
    measured = metrics(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]), ["normal", "lesion"])
    assert measured.per_class[1].precision is None
    assert measured.per_class[1].f1 == 0.0


def test_a_class_missing_in_the_labels_is_named() -> None:
    with pytest.raises(UserError, match="'knee', 'spine'"):
        metrics(np.eye(4), np.array([0, 1, 1, 0]), ["abd", "lung", "knee", "spine"])


def test_a_single_class_is_refused() -> None:
    with pytest.raises(UserError, match="two classes"):
        metrics(np.ones((2, 1)), np.array([0, 0]), ["only"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="finite"):
        metrics(np.array([[value, 1.0], [0.0, 1.0]]), np.array([0, 1]), ["a", "b"])


@pytest.mark.parametrize("row", [[0.6, 0.6], [2.0, -1.0], [-3.0, 1.2]])
def test_scores_that_are_no_probabilities_are_refused_and_shown(row: list[float]) -> None:
    with pytest.raises(UserError, match=f"image 1 are {row[0]:.4g}, {row[1]:.4g}"):
        metrics(np.array([[0.5, 0.5], row]), np.array([0, 1]), ["a", "b"])


def test_single_precision_probabilities_are_taken() -> None:
    scores, labels, _ = drawn(5, 10**6)
    assert metrics(scores.astype(np.float32), labels, names(5)).auroc == pytest.approx(
        metrics(scores, labels, names(5)).auroc, abs=1e-4
    )


def evaluator(folder: Path, flag: str, labels: np.ndarray) -> Evaluator:
    np.savez(folder / f"{flag}.npz", test_labels=labels)
    return Evaluator(flag, "test", root=str(folder))


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize("flag", ["bloodmnist", "retinamnist"])
def test_medmnist_definitions_of_several_classes(tmp_path: Path, flag: str, levels: int) -> None:
    n_classes = len(INFO[flag]["label"])
    scores, labels, _ = drawn(n_classes, levels)
    expected = evaluator(tmp_path, flag, labels[:, None]).evaluate(scores)
    assert medmnist_metrics(scores, labels[:, None], INFO[flag]["task"]) == pytest.approx(expected, abs=1e-12, rel=0)
    ours = metrics(scores, labels, names(n_classes))
    assert (ours.auroc, ours.accuracy) == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize("columns", [1, 2])
def test_medmnist_definitions_of_two_classes(tmp_path: Path, columns: int, levels: int) -> None:
    scores, labels, _ = drawn(2, levels)
    expected = evaluator(tmp_path, "breastmnist", labels[:, None]).evaluate(scores[:, -columns:])
    assert medmnist_metrics(scores[:, -columns:], labels, "binary-class") == pytest.approx(expected, abs=1e-12, rel=0)
    ours = metrics(scores, labels, names(2))
    assert (ours.auroc, ours.accuracy) == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.parametrize("levels", [3, 10**6])
def test_medmnist_definitions_of_several_labels(tmp_path: Path, levels: int) -> None:
    _, _, rng = drawn(2, levels)
    labels = np.concatenate([np.zeros((1, 14), int), np.ones((1, 14), int), rng.integers(0, 2, (60, 14))])
    scores = rng.integers(0, levels, labels.shape) / levels
    scores[5], labels[5] = 0.5, 1  # on the threshold, and so not picked
    expected = evaluator(tmp_path, "chestmnist", labels).evaluate(scores)
    assert medmnist_metrics(scores, labels, INFO["chestmnist"]["task"]) == pytest.approx(expected, abs=1e-12, rel=0)


def test_a_score_on_medmnists_threshold_is_not_picked(tmp_path: Path) -> None:
    scores, labels = np.array([0.5, 0.2, 0.5]), np.array([1, 0, 0])
    expected = evaluator(tmp_path, "breastmnist", labels[:, None]).evaluate(scores)
    assert medmnist_metrics(scores, labels, "binary-class") == pytest.approx(expected, abs=1e-12, rel=0)
    assert round(expected.ACC, 4) == 0.6667


def test_medmnist_metrics_without_a_class_are_refused() -> None:
    with pytest.raises(UserError, match="column 2"):
        medmnist_metrics(np.full((3, 3), 1 / 3), np.array([0, 1, 1]), "multi-class")
    with pytest.raises(UserError, match="column 0"):
        medmnist_metrics(np.array([0.1, 0.2]), np.array([1, 1]), "binary-class")
    with pytest.raises(UserError, match="did you mean 'multi-class'"):
        medmnist_metrics(np.array([0.1, 0.2]), np.array([0, 1]), "multiclass")
