from __future__ import annotations

import secrets

import numpy as np
import pytest

from data_prep.errors import UserError
from medpretrain.evaluation.folds import fraction_of, k_folds

PERCENTS = (1, 5, 10, 20, 50, 100)


def drawn(mixed: float = 0.1, n_patients: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Images of three classes, the last one rare; some patients have images of several."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 6, n_patients)
    of_patient = rng.choice(3, n_patients, p=[0.6, 0.3, 0.1])
    of_patient[:30] = np.repeat(np.arange(3), 10)
    numbers = rng.permutation(10**6)[:n_patients]
    patients, labels = np.repeat(numbers, images), np.repeat(of_patient, images)
    other = rng.random(len(labels)) < mixed
    other[np.unique(patients, return_index=True)[1]] = False
    labels[other] = rng.integers(0, 3, other.sum())
    order = rng.permutation(len(labels))
    return labels[order], patients[order]


@pytest.mark.parametrize("mixed", [0.0, 0.2])
def test_fractions_are_nested_hold_each_class_and_whole_patients(mixed: float) -> None:
    labels, patients = drawn(mixed)
    before: set[int] = set()
    for percent in PERCENTS:
        chosen = fraction_of(labels, patients, percent, seed=3)
        assert (np.diff(chosen) > 0).all()
        assert before <= set(chosen.tolist())
        assert set(labels[chosen]) == {0, 1, 2}
        assert np.array_equal(chosen, np.flatnonzero(np.isin(patients, patients[chosen])))
        before = set(chosen.tolist())
    assert len(before) == len(labels)


def test_a_fraction_takes_its_share_of_the_patients_of_each_class() -> None:
    labels, patients = drawn(mixed=0.0)
    for percent in PERCENTS:
        chosen = fraction_of(labels, patients, percent, seed=0)
        for k in range(3):
            n, of = (
                len(set(part[labels_ == k]))
                for part, labels_ in ((patients[chosen], labels[chosen]), (patients, labels))
            )
            assert n == max(1, int(percent * of / 100 + 0.5))


def test_a_patient_with_images_of_two_classes_counts_to_the_rarer() -> None:
    # Class 1 is rarer, so 9, which has both, is of it: 2 of the 4 of class 0 at 50 %, and 1 of {8, 9}; 9 is also there
    # where it comes first of those that have class 0.
    labels, patients = np.array([0, 1, 1, 0, 0, 0, 0]), np.array([9, 9, 8, 1, 2, 3, 4])
    chosen = [set(patients[fraction_of(labels, patients, 50, seed)].tolist()) for seed in range(30)]
    assert all(len(one & {1, 2, 3, 4}) == 2 for one in chosen)
    assert all(one & {8, 9} for one in chosen)
    assert any(8 not in one for one in chosen)


def test_another_seed_is_another_fraction() -> None:
    labels, patients = drawn()
    assert not np.array_equal(fraction_of(labels, patients, 20, 0), fraction_of(labels, patients, 20, 1))


def test_the_choice_is_of_the_patient_not_of_the_order_of_the_images() -> None:
    labels, patients = drawn()
    order = np.random.default_rng(0).permutation(len(labels))
    one = set(patients[fraction_of(labels, patients, 10, 5)].tolist())
    other = set(patients[order][fraction_of(labels[order], patients[order], 10, 5)].tolist())
    assert one == other
    dealt = [set(patients[test].tolist()) for _, test in k_folds(labels, patients, 5, 2)]
    assert dealt == [set(patients[order][test].tolist()) for _, test in k_folds(labels[order], patients[order], 5, 2)]


def test_the_choice_stays_what_it_was() -> None:
    """Folds are compared between results of different years: a change here makes them incomparable."""
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    patients = np.arange(10) + 100
    assert fraction_of(labels, patients, 50, seed=0).tolist() == [0, 2, 3, 6, 8]
    assert [test.tolist() for _, test in k_folds(labels, patients, 2)] == [[1, 3, 5, 6, 8], [0, 2, 4, 7, 9]]


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(UserError, match="up to 100 percent"):
        fraction_of(np.array([0, 1]), np.array([1, 2]), percent, 0)


def test_no_image_is_refused() -> None:
    with pytest.raises(UserError, match="no labelled image"):
        fraction_of(np.zeros(0, int), np.zeros(0, int), 10, 0)


@pytest.mark.parametrize("mixed", [0.0, 0.2])
@pytest.mark.parametrize("k", [2, 5])
def test_folds_part_the_images_between_patients_and_hold_each_class(k: int, mixed: float) -> None:
    labels, patients = drawn(mixed)
    folds = k_folds(labels, patients, k, seed=1)
    assert len(folds) == k
    assert np.array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(len(labels)))
    for train, test in folds:
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
        assert not set(patients[train]) & set(patients[test])
        assert set(labels[test]) == set(labels[train]) == {0, 1, 2}
        for c in range(3):
            # As even as whole patients of up to five images allow.
            assert abs((labels[test] == c).sum() - (labels == c).sum() / k) <= (5 if not mixed else 12)


def test_folds_of_one_image_a_patient_differ_by_one_in_each_class() -> None:
    labels = np.array([0] * 57 + [1] * 22 + [2] * 7)
    counts = [np.bincount(labels[test]) for _, test in k_folds(labels, np.arange(len(labels)), 5)]
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp([count.sum() for count in counts]) <= 1


def test_an_uneven_class_does_not_make_the_next_one_uneven() -> None:
    # Of class 1 one patient has nine images and one has one; the ten of class 0 are still five and five.
    labels, patients = np.array([1] * 10 + [0] * 10), np.array([50] * 9 + [51] + list(range(10)))
    counts = sorted(np.bincount(labels[test]).tolist() for _, test in k_folds(labels, patients, 2))
    assert counts == [[5, 1], [5, 9]]


def test_a_class_with_fewer_patients_than_folds_is_named() -> None:
    labels, patients = np.array([0] * 9 + [1] * 6), np.array([*range(9), 10, 10, 11, 11, 12, 12])
    with pytest.raises(UserError, match="class 'glaucoma' has 3 patients, fewer than the 5 folds"):
        k_folds(labels, patients, 5, classes=["normal", "glaucoma"])
    assert len(k_folds(labels, patients, 3, classes=["normal", "glaucoma"])) == 3


def test_a_class_without_a_patient_is_named_even_if_it_is_the_last() -> None:
    with pytest.raises(UserError, match="class 'b' has 0 patients"):
        k_folds(np.zeros(4, int), np.arange(4), 2, classes=["a", "b"])


def test_one_fold_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        k_folds(np.array([0, 1]), np.array([1, 2]), 1)
