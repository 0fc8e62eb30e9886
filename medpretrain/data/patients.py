"""Who the patient of an image is, and the part of a split that belongs to some of its patients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import Dataset
from medpretrain.data.counter import hash64, purpose

# A patient's number starts here where the patient is unknown: each such image is a patient of its own.
_UNKNOWN = 1 << 40
_FRACTION = purpose("fraction")


def patients(dataset: Dataset) -> NDArray[np.int64]:
    """A number a patient, (N,); an image whose patient is unknown has one of its own, from 2 ** 40 on."""
    column = dataset.index.column("patient").combine_chunks()
    codes = column.dictionary_encode() if not hasattr(column, "indices") else column
    numbers: NDArray[np.int64] = codes.indices.fill_null(-1).to_numpy().astype(np.int64)
    unknown = numbers < 0
    numbers[unknown] = _UNKNOWN + np.flatnonzero(unknown)
    return numbers


def some_patients(patients_N: NDArray[np.int64], percent: float) -> NDArray[np.int64]:
    """The places of the images of some percent of the patients, at least one: (n,), ascending.

    Patients are in the order of a hash of their numbers, and the first of them are taken: so a smaller percentage lies
    in a larger one, and no seed of a run changes who they are. Labels play no part in it.

    Args:
        patients_N: the patient of each image.
        percent: of the patients, above 0 and up to 100; rounded to whole patients.

    >>> some_patients(np.array([7, 7, 8, 9, 9]), 34).tolist()
    [2]
    >>> some_patients(np.array([7, 7, 8, 9, 9]), 67).tolist()
    [2, 3, 4]
    """
    assert 0 < percent <= 100
    there = np.unique(patients_N)
    drawn = there[np.argsort(hash64(_FRACTION, there), kind="stable")]
    chosen = drawn[: max(1, round(len(there) * percent / 100))]
    return np.flatnonzero(np.isin(patients_N, chosen))
