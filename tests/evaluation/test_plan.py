from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.evaluation.plan import choose_images, plan
from tests.evaluation.conftest import make_dataset


def test_a_classifier_a_fraction_and_seed_and_one_where_nothing_is_drawn(graded: Dataset) -> None:
    images = choose_images(graded, label="grade")
    drawn = plan(images, fractions=[100, 25], seeds=[0, 1])
    assert [(one.fraction, one.seed) for one in drawn] == [(25, 0), (25, 1), (100, 0), (100, 1)]
    fixed = plan(images, fractions=[100, 25], seeds=[0, 1], draws_nothing=True)
    assert [(one.fraction, one.seed) for one in fixed] == [(25, 0), (25, 1), (100, 0)]
    quarter, whole = fixed[0], fixed[2]
    assert set(quarter.train) < set(whole.train)
    assert len(whole.train) == len(images.train)
    assert len(np.unique(images.train.patients_N[quarter.train])) == 6
    assert images.val is not None
    assert len(np.unique(images.val.patients_N[quarter.val])) == 2  # who has few labels has few to choose with
    assert all(np.array_equal(one.test, np.arange(len(images.test))) for one in drawn)


def test_folds_are_the_same_in_every_repeat_and_part_no_patient(graded: Dataset) -> None:
    images = choose_images(graded, label="grade", folds=4)
    splits = plan(images, repeats=3)
    assert [(one.repeat, one.fold) for one in splits] == [(r, f) for r in range(3) for f in range(4)]
    assert len(images.train) == len(graded)
    for first, again in zip(splits[:4], splits[4:8], strict=True):
        np.testing.assert_array_equal(first.test, again.test)
        patients = images.train.patients_N
        assert not set(patients[first.train]) & set(patients[first.test])
    assert sorted(np.concatenate([one.test for one in splits[:4]])) == list(range(len(graded)))


def test_an_external_test_set_is_measured_whole_and_with_the_classes_of_what_was_learned(
    graded: Dataset, tmp_path: Path
) -> None:
    other = Dataset.open(make_dataset(tmp_path, key=7))
    images = choose_images(graded, label="grade", test_dataset=other)
    assert images.external
    assert images.test.dataset is other
    assert images.test.classes == images.train.classes
    same_name = choose_images(graded, label="grade", test_dataset=other, test_split="train")
    assert len(same_name.test) == other.info.splits["train"]


@pytest.mark.parametrize(
    ("chosen", "planned", "message"),
    [
        ({"test_split": "train"}, {}, "must not be the train split"),
        ({"folds": 1}, {}, "at least 2 folds"),
        ({}, {"repeats": 2}, "--repeats 2 repeats all folds"),
        ({"folds": 2}, {"repeats": 2, "draws_nothing": True}, "every repeat would be the same"),
        ({}, {"fractions": [10, 10]}, "each fraction is to be given once"),
        ({}, {"seeds": []}, "one at least: none"),
        ({}, {"fractions": [0]}, "above 0 and up to 100"),
        ({}, {"fractions": [float("nan")]}, "above 0 and up to 100"),
        ({"folds": 30}, {}, "cannot be in the test part of each"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    graded: Dataset, chosen: dict[str, Any], planned: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(choose_images(graded, label="grade", **chosen), **planned)


def test_a_class_without_a_test_image_is_refused(tmp_path: Path) -> None:
    dataset = Dataset.open(make_dataset(tmp_path, lacking="dark"))
    with pytest.raises(UserError, match="no image of class 'dark' in label 'grade' of split 'test'"):
        choose_images(dataset, label="grade")


def test_folds_of_an_external_test_set_are_refused(graded: Dataset, tmp_path: Path) -> None:
    other = Dataset.open(make_dataset(tmp_path, key=7))
    with pytest.raises(UserError, match="one of the two"):
        choose_images(graded, label="grade", test_dataset=other, folds=2)
