"""How far a result would move with other patients: bootstrap intervals clustered by patient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from medpretrain.data.counter import hash64, purpose
from medpretrain.evaluation.metrics import SCALARS, Scored
from medpretrain.evaluation.results import Interval, Predictions, Summary, Unit

RESAMPLES = 1000
BOUNDS = (0.025, 0.975)
"""The quantiles that are a 95 % interval."""

# Weights of one unit at once: 512 KiB an array, so that they stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 16


def bootstrap(
    predictions: Predictions, classes: Sequence[str], units: list[Unit], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """95 % percentile interval of each of `SCALARS`, its mean over the units (`mean_over_units`).

    A resample draws as many patients as there are, with replacement; a patient's images come together, and the same
    draw serves all units, so that a patient tested on in several folds or repeats is in all of them or in none. The
    classifiers are not fitted anew: the interval is that of the patients tested on, not of training.

    A resample in which some unit would lack a class is drawn anew, for all metrics alike: AUROC has no value there. The
    interval is then given that each class occurs; where more than half of the draws have to be given up it would say
    too little of the patients, and is refused. `require_resamples` tells this before anything is trained.

    Of a small test set the interval of ECE lies high, often above the measured value: a resample holds images twice,
    and what is left to chance in a bin of few images grows.

    Args:
        predictions: of these units, and perhaps of others.
        classes: the K names.
        units: of one fraction.
        resamples: B; draws are hashes of the seed, the same on every machine.
        seed: of the draws.

    Raises:
        UserError: fewer resamples than an interval needs; too many without a class.
    """
    values = resampled(predictions, classes, units, resamples=resamples, seed=seed)
    return {name: percentile_interval(value_B) for name, value_B in values.items()}


def bootstrap_difference(
    first: Predictions,
    second: Predictions,
    classes: Sequence[str],
    units: tuple[list[Unit], list[Unit]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % interval of first minus second, both on the same patients: a resample serves both (paired bootstrap).

    Raises:
        UserError: as `bootstrap`; the two were not tested on the same images.
    """
    parts = [of_units(part, chosen) for part, chosen in zip((first, second), units, strict=True)]
    require_same_images(*parts)
    of_first, of_second = (
        resampled(part, classes, chosen, resamples=resamples, seed=seed)
        for part, chosen in zip(parts, units, strict=True)
    )
    return {name: percentile_interval(of_first[name] - of_second[name]) for name in SCALARS}


def summarise(
    units: list[Unit],
    predictions: Predictions,
    classes: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Summary]:
    """One summary a fraction, ascending: mean, spread between repeats or seeds, and interval.

    Args:
        units: all of an evaluation.
        predictions: theirs.
        classes: the K names.
        resamples: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap.

    Raises:
        UserError: as `bootstrap`.
    """
    summaries = []
    for fraction in sorted({unit.fraction for unit in units}):
        chosen = [unit for unit in units if unit.fraction == fraction]
        runs = by_repeat(chosen)
        values = {name: np.array([_mean(run, name) for run in runs.values()]) for name in SCALARS}
        summaries.append(
            Summary(
                fraction=fraction,
                units=len(chosen),
                mean={name: float(value.mean()) for name, value in values.items()},
                sd={name: float(value.std(ddof=1)) for name, value in values.items()} if len(runs) > 1 else None,
                interval=bootstrap(predictions, classes, chosen, resamples=resamples, seed=seed) if resamples else {},
            )
        )
    return summaries


def by_repeat(units: Sequence[Unit]) -> dict[tuple[int, int], list[Unit]]:
    """The folds of each (seed, repeat), in their order: what one value of an evaluation is the mean of."""
    runs: dict[tuple[int, int], list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.seed, unit.repeat, unit.number)):
        runs.setdefault((unit.seed, unit.repeat), []).append(unit)
    return runs


def mean_over_units(units: Sequence[Unit]) -> dict[int, float]:
    """The weight of each unit, by number, in the mean over repeats and seeds of the mean over folds; they sum to 1."""
    runs = by_repeat(units)
    return {unit.number: 1.0 / (len(runs) * len(run)) for run in runs.values() for unit in run}


def resampled(
    predictions: Predictions, classes: Sequence[str], units: Sequence[Unit], *, resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """The mean over units of each of `SCALARS` in each resample, (B,); see `bootstrap`.

    The draws depend on the seed, the patients and their labels alone: of two methods tested on the same images, entry b
    is of the same patients.
    """
    part = of_units(predictions, units)
    counts_BP, place_R = require_resamples(
        part.unit_R, part.patient_R, part.label_R, classes, resamples=resamples, seed=seed
    )
    totals = {name: np.zeros(resamples) for name in SCALARS}
    for number, share in mean_over_units(units).items():
        rows = np.flatnonzero(part.unit_R == number)
        scored = Scored(part.scores_RK[rows], part.label_R[rows])
        step = max(1, _CHUNK_ELEMENTS // len(rows))
        for start in range(0, resamples, step):
            weights = counts_BP[start : start + step, place_R[rows]].astype(np.float64)
            for name, value in scored.scalars(weights).items():
                totals[name][start : start + step] += share * value
    return totals


def require_resamples(
    unit_R: NDArray[np.integer],
    patient_R: NDArray[np.integer],
    label_R: NDArray[np.integer],
    classes: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The resamples of the patients, of which each unit has all classes; no score is needed, so it can come first.

    Args:
        unit_R: which unit an image is tested on in.
        patient_R: a number a patient, the same in all units.
        label_R: its class.
        classes: the K names.
        resamples: B.
        seed: of the draws.

    Returns:
        How often each resample holds each patient (B, P), and each image's patient (R,), 0 to P - 1.

    Raises:
        UserError: fewer than 100 resamples; more than half of the draws had to be given up.
    """
    if resamples < 100:
        raise UserError(f"a 95 % interval needs at least 100 resamples; asked for were {resamples}")
    patients, place_R = np.unique(patient_R, return_inverse=True)
    needed_PX, of_class_X = _needed(unit_R, place_R, label_R, len(patients), len(classes))
    kept: list[NDArray[np.int32]] = []
    found, lacked_X = 0, np.zeros(len(of_class_X), np.int64)
    step = max(1, _CHUNK_ELEMENTS // len(patients))
    for start in range(0, 2 * resamples, step):
        counts = _draws(np.arange(start, min(start + step, 2 * resamples)), len(patients), seed)
        held = counts.astype(np.float32) @ needed_PX > 0
        lacked_X += (~held).sum(axis=0)
        kept.append(counts[held.all(axis=1)])
        found += len(kept[-1])
        if found >= resamples:
            return np.concatenate(kept)[:resamples], place_R
    worst = int(lacked_X.argmax())
    few = int(needed_PX[:, worst].sum())
    raise UserError(
        f"no 95 % interval: {2 * resamples - found} of {2 * resamples} resamples of the patients lack a class in some "
        f"test part, most often {classes[of_class_X[worst]]!r}, which a test part has of {few} "
        f"patient{'s' * (few != 1)} alone; ask for fewer folds, or for 0 resamples to have no interval"
    )


def _needed(
    unit_R: NDArray[np.integer], place_R: NDArray[np.int64], label_R: NDArray[np.integer], P: int, K: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of each (unit, class) the patients that have it, (P, X), and the class, (X,); equal ones once."""
    _, unit_R = np.unique(unit_R, return_inverse=True)
    groups = unit_R.astype(np.int64) * K + label_R
    columns: dict[bytes, tuple[NDArray[np.bool_], int]] = {}
    for group in range((int(unit_R.max()) + 1) * K):
        column = np.zeros(P, bool)
        column[place_R[groups == group]] = True
        columns.setdefault(column.tobytes(), (column, group % K))
    needed_PX = np.stack([column for column, _ in columns.values()], axis=1).astype(np.float32)
    return needed_PX, np.array([k for _, k in columns.values()])


def _draws(numbers_B: NDArray[np.int64], P: int, seed: int) -> NDArray[np.int32]:
    """How often each of P patients is drawn in P draws, (B, P)."""
    words = hash64(purpose("evaluation.bootstrap"), seed, numbers_B[:, None], np.arange(P))
    cell = np.arange(len(numbers_B))[:, None] * P + (words % np.uint64(P)).astype(np.int64)
    return np.bincount(cell.ravel(), minlength=len(numbers_B) * P).reshape(-1, P).astype(np.int32)


def percentile_interval(value_B: NDArray[np.float64]) -> Interval:
    """The 2.5 and 97.5 percentiles."""
    low, high = np.quantile(value_B, BOUNDS).tolist()
    return Interval(low=low, high=high)


def of_units(predictions: Predictions, units: Sequence[Unit]) -> Predictions:
    """The rows of some units, by unit and row of the dataset.

    Raises:
        UserError: a unit without them.
    """
    wanted = [unit.number for unit in units]
    chosen = np.flatnonzero(np.isin(predictions.unit_R, wanted))
    chosen = chosen[np.lexsort((predictions.row_R[chosen], predictions.unit_R[chosen]))]
    missing = set(wanted) - set(predictions.unit_R[chosen].tolist())
    if missing:
        raise UserError(f"the predictions have no image of unit {', '.join(map(str, sorted(missing)))}")
    return Predictions(
        *(getattr(predictions, name)[chosen] for name in ("unit_R", "row_R", "patient_R", "label_R", "scores_RK"))
    )


def require_same_images(first: Predictions, second: Predictions) -> None:
    """Refuse to pair what was not tested on the same images in the same units; both sorted by `of_units`.

    Raises:
        UserError: naming what differs.
    """
    for name, what in (("unit_R", "units"), ("row_R", "images"), ("patient_R", "patients"), ("label_R", "labels")):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise UserError(f"the two evaluations cannot be paired: their test {what} differ")


def _mean(units: Sequence[Unit], name: str) -> float:
    return float(np.mean([getattr(unit.metrics, name) for unit in units]))
