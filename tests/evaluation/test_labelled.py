from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.evaluation.labelled import knowledge, labelled, occurring_classes, patients, refuse_shared_patients
from tests.evaluation.conftest import make_dataset


def test_classes_are_joined_by_name_and_patients_are_told_apart(graded: Dataset) -> None:
    assert occurring_classes(graded, "grade") == ("dark", "light")
    part = labelled(graded, ["test"], "grade", ("light", "dark"))
    assert part.counts() == [int((part.labels_N == 0).sum()), int((part.labels_N == 1).sum())]
    assert len(np.unique(part.patients_N)) == 8
    names = graded.label_names("grade")
    assert [part.classes[k] for k in part.labels_N] == [names[k] for k in graded.labels("grade")[part.rows_N]]
    of_patient = {patient: set(part.labels_N[part.patients_N == patient]) for patient in part.patients_N.tolist()}
    assert all(len(classes) == 1 for classes in of_patient.values())
    assert knowledge(graded) == "known"


def test_an_image_without_a_patient_is_a_patient_of_its_own(small_dataset: Path) -> None:
    dataset = Dataset.open(small_dataset)
    assert knowledge(dataset) == "unknown"
    assert len(np.unique(patients(dataset))) == len(dataset)


def test_unlabelled_images_are_refused_unless_they_are_to_be_left_out(tmp_path: Path) -> None:
    dataset = Dataset.open(make_dataset(tmp_path, unlabelled=3))
    total = dataset.info.splits["test"]
    with pytest.raises(UserError, match=rf"3 of {total} images of split 'test' .* --leave-out-unlabelled"):
        labelled(dataset, ["test"], "grade", ("dark", "light"))
    part = labelled(dataset, ["test"], "grade", ("dark", "light"), leave_out=True)
    assert (len(part), part.left_out) == (total - 3, 3)


def test_a_split_without_any_label_is_refused(tmp_path: Path) -> None:
    dataset = Dataset.open(make_dataset(tmp_path, unlabelled=100))
    with pytest.raises(UserError, match=r"no image of split 'test' .* has a label 'grade'"):
        labelled(dataset, ["test"], "grade", ("dark", "light"), leave_out=True)


def test_one_class_is_no_evaluation(graded: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'grad'.*'grade'"):
        occurring_classes(graded, "grad")


def test_a_patient_in_both_parts_is_refused(graded: Dataset) -> None:
    train = labelled(graded, ["train"], "grade", ("dark", "light"))
    both = labelled(graded, ["train", "test"], "grade", ("dark", "light"))
    refuse_shared_patients(train, labelled(graded, ["test"], "grade", ("dark", "light")))
    with pytest.raises(UserError, match="24 patients have images both"):
        refuse_shared_patients(train, both)


def test_a_patient_of_another_dataset_is_refused_by_pseudonym(graded: Dataset, tmp_path: Path) -> None:
    """Two datasets made with one key give a patient the same pseudonym."""
    train = labelled(graded, ["train"], "grade", ("dark", "light"))
    copy = Dataset.open(make_dataset(tmp_path / "same", unlabelled=1))
    assert copy.sha256 != graded.sha256
    again = labelled(copy, ["train"], "grade", ("dark", "light"))
    with pytest.raises(UserError, match="24 patients"):
        refuse_shared_patients(train, again)
    other = Dataset.open(make_dataset(tmp_path / "other", key=1))
    refuse_shared_patients(train, labelled(other, ["test"], "grade", ("dark", "light")))
