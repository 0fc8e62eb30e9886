"""The images of a dataset that a label is known of, with their patients: what is learned from and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.data.patients import patients


@dataclass(frozen=True)
class Labelled:
    """N images of one or several splits of a dataset, in the order of their rows."""

    dataset: Dataset
    rows_N: NDArray[np.int64]
    labels_N: NDArray[np.int32]
    """From 0 to K - 1, places in `classes`."""
    patients_N: NDArray[np.int64]
    classes: tuple[str, ...]
    left_out: int
    """Images without the label."""

    def __len__(self) -> int:
        return len(self.rows_N)

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels_N, minlength=len(self.classes)).tolist()


def occurring_classes(dataset: Dataset, label: str) -> tuple[str, ...]:
    """The names of a label's vocabulary that occur in a dataset, in whatever split, in their order.

    Raises:
        UserError: no such label, or fewer than two classes.
    """
    ids = dataset.labels(label)
    names = [name for number, name in enumerate(dataset.label_names(label)) if (ids == number).any()]
    if len(names) < 2:
        raise UserError(f"an evaluation needs at least two classes; label {label!r} of {dataset.path} has {len(names)}")
    return tuple(names)


def labelled(
    dataset: Dataset, splits: Sequence[str], label: str, classes: Sequence[str], *, leave_out: bool = False
) -> Labelled:
    """The labelled images of some splits.

    Args:
        dataset: where they are.
        splits: their names.
        label: the name of a label.
        classes: what its ids are to mean; joined by name.
        leave_out: leave out, and count, images without this label or of none of the classes.

    Raises:
        UserError: no such split or label; images without the label, unless they are to be left out; none with it.
    """
    rows = np.sort(np.concatenate([dataset.rows(split) for split in splits]))
    place = {name: number for number, name in enumerate(classes)}
    of_id = np.array([place.get(name, -1) for name in dataset.label_names(label)] + [-1], np.int32)
    ids = of_id[dataset.labels(label)[rows]]  # -1, unknown, takes the last
    known = ids >= 0
    missing, where = int((~known).sum()), " and ".join(repr(split) for split in splits)
    if missing == len(rows):
        raise UserError(
            f"no image of split {where} of {dataset.path} has a label {label!r} out of {', '.join(classes)}"
        )
    if missing and not leave_out:
        raise UserError(
            f"{missing} of {len(rows)} images of split {where} of {dataset.path} have no label {label!r} out of "
            f"{', '.join(classes)}; --leave-out-unlabelled measures the others, and says so"
        )
    return Labelled(dataset, rows[known], ids[known], patients(dataset)[rows[known]], tuple(classes), missing)


def knowledge(dataset: Dataset) -> Literal["known", "partly known", "unknown"]:
    """Whether patients are `known`, `partly known` or `unknown`."""
    without = dataset.info.patients.images_without
    return "known" if not without else "unknown" if without == len(dataset) else "partly known"


def refuse_shared_patients(train: Labelled, test: Labelled) -> None:
    """Raises:
    UserError: a known patient has images in both. In two datasets one is known again only where both were prepared
        with the same key: without one patients are numbered anew in each.
    """
    if train.dataset.sha256 == test.dataset.sha256:
        both = np.intersect1d(train.patients_N, test.patients_N)
    elif train.dataset.info.patient_key is not None and train.dataset.info.patient_key == test.dataset.info.patient_key:
        names = [set(part.dataset.index.column("patient").take(part.rows_N).to_pylist()) for part in (train, test)]
        both = np.array(sorted((names[0] & names[1]) - {None}))
    else:
        return
    if len(both):
        raise UserError(
            f"{len(both)} patients have images both in what is learned from and in what is measured on; "
            "the result would be of patients already seen"
        )
