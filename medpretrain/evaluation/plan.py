"""Which patients a classifier learns from and which it is measured on, for every classifier of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.evaluation.folds import fraction_of, k_folds
from medpretrain.evaluation.labelled import Labelled, labelled, occurring_classes, refuse_shared_patients
from medpretrain.evaluation.metrics import require_all_classes

VAL_SPLIT = "val"


@dataclass(frozen=True)
class Images:
    """All that an evaluation stands on, before it is parted."""

    train: Labelled
    val: Labelled | None
    """What settings may be chosen on; None for folds, and where the dataset has no such split."""
    test: Labelled
    """The same as `train` for folds."""
    folds: int

    @property
    def external(self) -> bool:
        return self.train.dataset.sha256 != self.test.dataset.sha256


@dataclass(frozen=True)
class Split:
    """One classifier's: places in `Images.train`, `val` and `test`."""

    fraction: float
    seed: int
    repeat: int
    fold: int | None
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def choose_images(
    dataset: Dataset,
    *,
    label: str,
    train_split: str = "train",
    test_split: str = "test",
    test_dataset: Dataset | None = None,
    folds: int = 0,
    leave_out: bool = False,
) -> Images:
    """The images of one dataset's splits, of all its images for folds, or of two datasets.

    The classes are the names of the label's vocabulary that occur in `dataset`, in whatever split.

    Args:
        dataset: what is learned from.
        label: the label to predict.
        train_split: of `dataset`.
        test_split: of `test_dataset`, or of `dataset` where there is none.
        test_dataset: an external test set; its label names are joined to the classes.
        folds: above 0, all images are pooled and parted into so many.
        leave_out: leave out and count images whose label is unknown.

    Raises:
        UserError: a split or label that is not there, unlabelled images, a class without an image in train or test, a
            patient in both, folds of an external test set.
    """
    classes = occurring_classes(dataset, label)
    if folds:
        if test_dataset is not None:
            raise UserError("folds part one dataset; an external test set is measured on whole: give one of the two")
        if folds < 2:
            raise UserError(f"there must be at least 2 folds, not {folds}")
        pool = labelled(dataset, list(dataset.info.splits), label, classes, leave_out=leave_out)
        return Images(pool, None, pool, folds)
    if train_split == test_split and test_dataset is None:
        raise UserError(f"the test split must not be the train split {train_split!r}")
    train = labelled(dataset, [train_split], label, classes, leave_out=leave_out)
    test = labelled(test_dataset or dataset, [test_split], label, classes, leave_out=leave_out)
    has_val = dataset.info.splits.get(VAL_SPLIT) and VAL_SPLIT not in (train_split, test_split)
    val = labelled(dataset, [VAL_SPLIT], label, classes, leave_out=leave_out) if has_val else None
    for part, split in ((train, train_split), (test, test_split), *([(val, VAL_SPLIT)] if val else [])):
        require_all_classes(part.labels_N, classes, where=f"label {label!r} of split {split!r} of {part.dataset.path}")
    refuse_shared_patients(train, test)
    if val:
        refuse_shared_patients(train, val)
        refuse_shared_patients(val, test)
    return Images(train, val, test, 0)


def plan(
    images: Images,
    *,
    fractions: Sequence[float] = (100.0,),
    seeds: Sequence[int] = (0,),
    repeats: int = 1,
    draws_nothing: bool = False,
) -> list[Split]:
    """Every classifier to be fitted, fraction by fraction.

    On the dataset's own splits there is one a seed: the seed draws the fraction's patients and the classifier's random
    numbers. Of folds there is one a repeat, seed and fold: folds are always the same, a repeat has other random
    numbers (ModAn-MulSupCon, section 4.2). A fraction of val is taken as of train: who has few labels has few to choose
    with.

    Args:
        images: from `choose_images`.
        fractions: percent of the training patients.
        seeds: one or several.
        repeats: of all folds, above 1 for folds only.
        draws_nothing: the classifier has no random numbers, so at 100 percent one seed and one repeat say all.

    Raises:
        UserError: a fraction out of (0, 100], something named twice, repeats where they cannot be; what `fraction_of`
            and `k_folds` refuse.
    """
    for name, given in (("fraction", fractions), ("seed", seeds)):
        if not given or len(set(given)) != len(given):
            raise UserError(
                f"each {name} is to be given once, and one at least: {', '.join(map(str, given)) or 'none'}"
            )
    if any(not 0 < fraction <= 100 for fraction in fractions):
        raise UserError(f"a fraction is a percentage above 0 and up to 100: {', '.join(map(str, fractions))}")
    if repeats < 1 or (repeats > 1 and not images.folds):
        raise UserError(f"--repeats {repeats} repeats all folds: give --folds too, or --seeds without folds")
    if repeats > 1 and draws_nothing:
        raise UserError("this protocol draws no random numbers: every repeat would be the same")
    train, val, test = images.train, images.val, images.test
    parts: list[tuple[int | None, NDArray[np.int64], NDArray[np.int64]]]
    if images.folds:
        folds = k_folds(train.labels_N, train.patients_N, images.folds, classes=train.classes)
        parts = [(fold, *part) for fold, part in enumerate(folds)]
    else:
        parts = [(None, np.arange(len(train), dtype=np.int64), np.arange(len(test), dtype=np.int64))]
    splits = []
    for fraction in sorted(fractions):
        once = draws_nothing and fraction == 100
        for repeat in range(repeats):
            for seed in seeds[:1] if once else seeds:
                for fold, learned, measured in parts:
                    chosen = fraction_of(train.labels_N[learned], train.patients_N[learned], fraction, seed)
                    held = fraction_of(val.labels_N, val.patients_N, fraction, seed) if val else np.zeros(0, np.int64)
                    splits.append(Split(fraction, seed, repeat, fold, learned[chosen], held, measured))
    return splits
