from __future__ import annotations

import secrets

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from data_prep.errors import UserError
from medpretrain.evaluation.intervals import (
    bootstrap,
    bootstrap_difference,
    mean_over_units,
    require_resamples,
    resampled,
    summarise,
)
from medpretrain.evaluation.metrics import SCALARS, metrics
from medpretrain.evaluation.results import Predictions, Unit

CLASSES = ["normal", "lesion"]


def scored_units(
    rng: np.random.Generator,
    plan: list[tuple[int, int, int | None]],
    *,
    patients: int = 40,
    images: int = 3,
    fraction: float = 100,
    start: int = 0,
) -> tuple[list[Unit], Predictions]:
    """Units of (seed, repeat, fold): each fold tests its part of the patients, None all of them."""
    patient = np.repeat(np.arange(patients) * 7 + 1, images)
    label = np.repeat(np.arange(patients) % 2, images)
    folds = 1 + max(-1 if fold is None else fold for _, _, fold in plan)
    units, parts = [], []
    for number, (seed, repeat, fold) in enumerate(plan, start):
        inside = np.ones(len(label), bool) if fold is None else np.arange(len(label)) // images // 2 % folds == fold
        n = int(inside.sum())
        lesion = 1 / (1 + np.exp(-rng.normal(0.8 * (2 * label[inside] - 1), 1.5).round(1)))
        scores = np.stack([1 - lesion, lesion], axis=1)
        parts.append(
            Predictions(
                np.full(n, number, np.int32),
                np.flatnonzero(inside),
                patient[inside],
                label[inside].astype(np.int32),
                scores,
            )
        )
        units.append(
            Unit(
                number=number,
                fraction=fraction,
                seed=seed,
                repeat=repeat,
                fold=fold,
                n_train=10,
                n_val=0,
                n_test=n,
                parameters={},
                metrics=metrics(scores, label[inside], CLASSES),
            )
        )
    return units, Predictions.joined(parts)


def generator() -> np.random.Generator:
    seed = secrets.randbits(32)
    print("seed", seed)
    return np.random.default_rng(seed)


FIVE_BY_TWO = [(0, repeat, fold) for repeat in range(2) for fold in range(5)]


def test_a_resample_is_its_patients_copied_once_for_all_units() -> None:
    units, predictions = scored_units(generator(), FIVE_BY_TWO)
    values = resampled(predictions, CLASSES, units, resamples=100, seed=4)
    counts, place = require_resamples(
        predictions.unit_R, predictions.patient_R, predictions.label_R, CLASSES, resamples=100, seed=4
    )
    for b in range(5):
        by_repeat = []
        for repeat in range(2):
            by_fold = []
            for unit in units:
                if unit.repeat == repeat:
                    rows = np.flatnonzero(predictions.unit_R == unit.number)
                    rows = np.repeat(rows, counts[b][place[rows]])
                    by_fold.append(metrics(predictions.scores_RK[rows], predictions.label_R[rows], CLASSES))
            by_repeat.append({name: np.mean([getattr(one, name) for one in by_fold]) for name in SCALARS})
        expected = {name: np.mean([one[name] for one in by_repeat]) for name in SCALARS}
        assert {name: values[name][b] for name in SCALARS} == pytest.approx(expected, abs=1e-12, rel=0)


def test_a_resample_draws_as_many_patients_as_there_are_evenly() -> None:
    unit, patient = np.zeros(50, int), np.arange(50)
    counts, _ = require_resamples(unit, patient, patient % 2, CLASSES, resamples=2000, seed=0)
    assert counts.shape == (2000, 50)
    assert (counts.sum(axis=1) == 50).all()
    # Multinomial: mean 1 and variance 1 - 1/50 a patient; five standard errors of 2000 draws.
    assert np.abs(counts.mean(axis=0) - 1).max() < 5 * np.sqrt(0.98 / 2000)
    assert abs(counts.var() - 0.98) < 0.03


def test_the_interval_is_between_the_percentiles_and_holds_the_value() -> None:
    units, predictions = scored_units(generator(), FIVE_BY_TWO)
    values = resampled(predictions, CLASSES, units, resamples=400, seed=0)
    found = bootstrap(predictions, CLASSES, units, resamples=400)
    assert set(found) == set(SCALARS)
    for name in SCALARS:
        assert (found[name].low, found[name].high) == tuple(np.quantile(values[name], [0.025, 0.975]))
    mean = np.mean([unit.metrics.auroc for unit in units])
    assert found["auroc"].low < mean < found["auroc"].high


def test_images_of_one_patient_say_less_than_as_many_patients() -> None:
    units, predictions = scored_units(generator(), [(0, 0, None)], patients=40, images=1)
    copies = [getattr(predictions, name) for name in ("unit_R", "row_R", "patient_R", "label_R", "scores_RK")]
    repeated = Predictions(*(np.repeat(column, 9, axis=0) for column in copies))
    repeated.row_R = np.arange(len(repeated.row_R))
    alone, clustered = (bootstrap(part, CLASSES, units, resamples=300)["auroc"] for part in (predictions, repeated))
    # The nine images of a patient are one and the same: nothing is known that was not.
    assert clustered.model_dump() == pytest.approx(alone.model_dump(), abs=1e-12)
    repeated.patient_R = np.arange(len(repeated.row_R))
    as_patients = bootstrap(repeated, CLASSES, units, resamples=300)["auroc"]
    assert as_patients.high - as_patients.low < 0.6 * (alone.high - alone.low)


def test_95_percent_of_intervals_hold_the_truth() -> None:
    rng = generator()
    truth, held, tries = 0.0, 0, 120
    positive, negative = rng.normal(1, 1, 200_000), rng.normal(0, 1, 200_000)
    truth = float(np.mean(positive > negative))
    label = np.arange(120) % 2
    for _ in range(tries):
        lesion = 1 / (1 + np.exp(-rng.normal(label, 1)))
        scores = np.stack([1 - lesion, lesion], axis=1)
        part = Predictions(np.zeros(120, np.int32), np.arange(120), np.arange(120), label.astype(np.int32), scores)
        unit = Unit(
            number=0,
            fraction=100,
            seed=0,
            repeat=0,
            fold=None,
            n_train=1,
            n_val=0,
            n_test=120,
            parameters={},
            metrics=metrics(scores, label, CLASSES),
        )
        interval = bootstrap(part, CLASSES, [unit], resamples=200)["auroc"]
        held += interval.low <= truth <= interval.high
    # Fewer than 101 of 120 would have a chance below 1e-5 at 95 %.
    assert held > 100


def test_the_same_seed_gives_the_same_interval_in_any_order_of_rows() -> None:
    rng = generator()
    units, predictions = scored_units(rng, FIVE_BY_TWO)
    order = rng.permutation(len(predictions.unit_R))
    shuffled = Predictions(
        *(getattr(predictions, name)[order] for name in ("unit_R", "row_R", "patient_R", "label_R", "scores_RK"))
    )
    one = bootstrap(predictions, CLASSES, units, resamples=100, seed=1)
    assert one == bootstrap(shuffled, CLASSES, units, resamples=100, seed=1)
    assert one != bootstrap(predictions, CLASSES, units, resamples=100, seed=2)


def test_weights_of_units_are_those_of_a_mean_of_means() -> None:
    rng = generator()
    units, _ = scored_units(rng, [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)])
    assert mean_over_units(units) == pytest.approx({0: 1 / 6, 1: 1 / 6, 2: 1 / 6, 3: 1 / 2})


def test_resamples_without_a_class_are_drawn_anew() -> None:
    # One unit's class "lesion" is of three patients: 1 in 20 resamples lacks it.
    label, patient = np.array([0] * 20 + [1] * 3), np.arange(23)
    counts, place = require_resamples(np.zeros(23, int), patient, label, CLASSES, resamples=500, seed=0)
    assert len(counts) == 500
    assert (counts[:, place[label == 1]].sum(axis=1) > 0).all()


def test_too_many_resamples_without_a_class_are_refused_and_the_class_named() -> None:
    # Five folds of one "lesion" patient each: hardly a tenth of the resamples have all.
    label = np.array([0] * 30 + [1] * 5)
    unit, patient = np.arange(35) % 5, np.arange(35)
    with pytest.raises(UserError, match=r"lack a class .* 'lesion', which a test part has of 1 patient alone"):
        require_resamples(unit, patient, label, CLASSES)


def test_too_few_resamples_are_refused() -> None:
    units, predictions = scored_units(generator(), [(0, 0, None)])
    with pytest.raises(UserError, match="at least 100 resamples"):
        bootstrap(predictions, CLASSES, units, resamples=20)


def test_a_unit_without_predictions_is_refused() -> None:
    units, predictions = scored_units(generator(), FIVE_BY_TWO)
    with pytest.raises(UserError, match="no image of unit 3"):
        bootstrap(Predictions.joined([predictions.of_unit(n) for n in range(10) if n != 3]), CLASSES, units)


def test_a_difference_is_of_the_same_patients() -> None:
    rng = generator()
    (units, first), (_, second) = (scored_units(rng, FIVE_BY_TWO) for _ in range(2))
    same = bootstrap_difference(first, first, CLASSES, (units, units), resamples=100)
    assert all((one.low, one.high) == (0.0, 0.0) for one in same.values())
    found = bootstrap_difference(first, second, CLASSES, (units, units), resamples=100, seed=3)["auroc"]
    by_hand = [resampled(part, CLASSES, units, resamples=100, seed=3)["auroc"] for part in (first, second)]
    assert (found.low, found.high) == tuple(np.quantile(by_hand[0] - by_hand[1], [0.025, 0.975]))


@pytest.mark.parametrize(("column", "what"), [("row_R", "images"), ("patient_R", "patients"), ("label_R", "labels")])
def test_a_difference_of_other_images_is_refused(column: str, what: str) -> None:
    units, predictions = scored_units(generator(), [(0, 0, None)])
    other = Predictions.joined([predictions])
    getattr(other, column)[0] += 1 if column != "row_R" else 10**6
    with pytest.raises(UserError, match=f"their test {what} differ"):
        bootstrap_difference(predictions, other, CLASSES, (units, units), resamples=100)


def test_a_summary_is_the_mean_of_repeats_and_their_spread_by_fraction() -> None:
    rng = generator()
    plans = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    small, few = scored_units(rng, plans, fraction=5, start=0)
    all_of, many = scored_units(rng, plans, fraction=100, start=4)
    found = summarise([*all_of, *small], Predictions.joined([few, many]), CLASSES, resamples=100)
    assert [(one.fraction, one.units) for one in found] == [(5, 4), (100, 4)]
    for one, units, predictions in ((found[0], small, few), (found[1], all_of, many)):
        auroc = [
            roc_auc_score(predictions.of_unit(u.number).label_R, predictions.of_unit(u.number).scores_RK[:, 1])
            for u in units
        ]
        repeats = [np.mean(auroc[:2]), np.mean(auroc[2:])]
        assert one.mean["auroc"] == pytest.approx(np.mean(repeats), abs=1e-12)
        assert one.sd is not None
        assert one.sd["auroc"] == pytest.approx(abs(repeats[0] - repeats[1]) / np.sqrt(2), abs=1e-12)
        assert one.interval == bootstrap(predictions, CLASSES, units, resamples=100)


def test_one_repeat_has_no_spread_and_no_resamples_no_interval() -> None:
    units, predictions = scored_units(generator(), [(0, 0, 0), (0, 0, 1)])
    (found,) = summarise(units, predictions, CLASSES, resamples=0)
    assert found.sd is None
    assert found.interval == {}
