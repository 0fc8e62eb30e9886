"""Which patients are learned from: fractions and folds that depend on the labels, the patients and a seed alone.

No method, library or version has a part in them: a patient's place comes from a hash of its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from medpretrain.data.counter import hash64, purpose

Places = NDArray[np.int64]


@dataclass(frozen=True)
class _Patients:
    """P patients in the order of their hashes.

    A patient belongs to the rarest of the classes of its images, rarity counted in patients that have it (of equally
    rare ones the first): a rare class is then spread first, and what comes with it is counted.
    """

    of_image_N: NDArray[np.int64]
    """Each image's patient, 0 to P - 1."""
    images_PK: NDArray[np.int64]
    class_P: NDArray[np.int64]

    @classmethod
    def of(
        cls, labels_N: NDArray[np.integer], patients_N: NDArray[np.integer], n_classes: int, words: tuple[int, int]
    ) -> _Patients:
        assert len(labels_N) == len(patients_N), f"{len(labels_N)} labels of {len(patients_N)} images"
        numbers, of_image = np.unique(patients_N, return_inverse=True)
        order = np.lexsort((numbers, hash64(*words, numbers)))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        of_image = place[of_image]
        images = np.bincount(of_image * n_classes + labels_N, minlength=len(numbers) * n_classes)
        images = images.reshape(len(numbers), n_classes)
        rarity = (images > 0).sum(axis=0)
        return cls(of_image, images, np.where(images > 0, rarity, len(numbers) + 1).argmin(axis=1))


def fraction_of(labels_N: NDArray[np.integer], patients_N: NDArray[np.integer], percent: float, seed: int) -> Places:
    """Some percent of the patients of each class, with all of their images.

    Of each class the first round(percent * patients / 100), halves up, in the order of a hash of seed and patient; a
    patient with images of several classes belongs to the rarest. The first patient with an image of a class is always
    chosen, so that each class is there. A smaller percentage is part of a greater one, and 100 is everything.

    Args:
        labels_N: from 0; the classes that occur are the ones kept.
        patients_N: a number a patient.
        percent: above 0, to 100.
        seed: another seed is another choice.

    Returns:
        Places of the chosen images, ascending.

    Raises:
        UserError: no image; a percentage out of range.

    >>> labels, patients = np.array([0, 0, 0, 0, 1, 1]), np.array([7, 7, 8, 9, 4, 5])
    >>> chosen = fraction_of(labels, patients, 50, seed=0)
    >>> len(set(patients[chosen][labels[chosen] == 0])), len(set(patients[chosen][labels[chosen] == 1]))
    (2, 1)
    """
    if not 0 < percent <= 100:
        raise UserError(f"a fraction of the training patients is above 0 and up to 100 percent; it is {percent:g}")
    patients = _Patients.of(labels_N, patients_N, _n_classes(labels_N), (purpose("evaluation.fraction"), seed))
    chosen_P = np.zeros(len(patients.class_P), bool)
    for k in np.flatnonzero(patients.images_PK.any(axis=0)):
        of_class = np.flatnonzero(patients.class_P == k)
        chosen_P[of_class[: math.floor(percent * len(of_class) / 100 + 0.5)]] = True
        chosen_P[(patients.images_PK[:, k] > 0).argmax()] = True
    return np.flatnonzero(chosen_P[patients.of_image_N])


def k_folds(
    labels_N: NDArray[np.integer],
    patients_N: NDArray[np.integer],
    k: int,
    seed: int = 0,
    *,
    classes: Sequence[str] | None = None,
) -> list[tuple[Places, Places]]:
    """k parts of the patients with as equal a share of each class as they allow, each tested on once.

    Patients are dealt class by class, the rarest first, a patient with images of several classes with the rarest; those
    with many images first, then in the order of a hash of seed and patient; each to the part that has fewest images of
    the class, of equal ones fewest images, of equal ones the first. With an image a patient, parts differ by at most
    one image in each class.

    Args:
        labels_N: from 0 to K - 1.
        patients_N: a number a patient.
        k: parts, at least 2.
        seed: another seed is another deal.
        classes: the names of the K classes, for messages.

    Returns:
        For each part the places to learn from and those to test on, ascending.

    Raises:
        UserError: fewer than 2 parts; a class with fewer patients than parts; a part that would lack a class.

    >>> folds = k_folds(np.array([0, 0, 1, 1, 1]), np.array([1, 2, 3, 3, 4]), 2)
    >>> sorted(len(test) for _, test in folds), all(len(train) + len(test) == 5 for train, test in folds)
    ([2, 3], True)
    """
    if k < 2:
        raise UserError(f"folds are at least 2; asked for were {k}")
    names = list(classes) if classes is not None else [str(number) for number in range(_n_classes(labels_N))]
    patients = _Patients.of(labels_N, patients_N, len(names), (purpose("evaluation.folds"), seed))
    holders_K = (patients.images_PK > 0).sum(axis=0)
    for number, holders in enumerate(holders_K.tolist()):
        if holders < k:
            raise UserError(
                f"class {names[number]!r} has {holders} patient{'s' * (holders != 1)}, fewer than the {k} folds: it "
                "cannot be in the test part of each; ask for fewer folds"
            )
    fold_P = np.full(len(patients.class_P), -1)
    images_FK = np.zeros((k, len(holders_K)), np.int64)
    size_P = patients.images_PK.sum(axis=1)
    for number in np.argsort(holders_K, kind="stable"):
        of_class = np.flatnonzero(patients.class_P == number)
        for patient in of_class[np.argsort(-size_P[of_class], kind="stable")]:
            fold = np.lexsort((images_FK.sum(axis=1), images_FK[:, number]))[0]
            fold_P[patient] = fold
            images_FK[fold] += patients.images_PK[patient]
    lacking = np.argwhere(images_FK == 0)
    if len(lacking):
        raise UserError(
            f"a fold of {k} would have no patient with an image of class {names[lacking[0, 1]]!r}: too many of its "
            "patients have images of rarer classes too; ask for fewer folds"
        )
    of_image = fold_P[patients.of_image_N]
    return [(np.flatnonzero(of_image != fold), np.flatnonzero(of_image == fold)) for fold in range(k)]


def _n_classes(labels_N: NDArray[np.integer]) -> int:
    if not len(labels_N):
        raise UserError("there is no labelled image to choose patients from")
    return int(labels_N.max()) + 1
