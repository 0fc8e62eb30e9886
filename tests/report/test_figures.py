"""Curves and matrices stand for the metrics they are drawn beside."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from medpretrain.report import drawing
from medpretrain.report.class_intervals import class_intervals
from medpretrain.report.drawing import PALETTE, UNTRAINED, finished, looks, panel
from medpretrain.report.figures_runs import thinned
from medpretrain.report.figures_scores import (
    GRID,
    class_values,
    confusion,
    precision_at_grid,
    reliability,
    roc_at_grid,
    summary_at,
)
from medpretrain.report.gather import Measured, Method
from tests.report.example import evaluated


@pytest.fixture(scope="module")
def one() -> Measured:
    evaluation, predictions = evaluated("simclr", repeats=2, folds=2)
    return Measured(Method("simclr", evaluation.source), evaluation, predictions)


@pytest.mark.parametrize("seed", range(3))
def test_the_areas_under_the_drawn_curves_are_auroc_and_average_precision(seed):
    print("seed", seed)
    draw = np.random.default_rng(seed)
    truth = draw.random(400) < 0.3
    scores = np.round(draw.normal(size=400) + truth, 1 + seed)  # ties
    drawn = np.trapezoid(roc_at_grid(truth, scores), GRID)
    assert drawn == pytest.approx(roc_auc_score(truth, scores), abs=0.006)
    assert precision_at_grid(truth, scores)[1:].mean() == pytest.approx(
        average_precision_score(truth, scores), abs=0.01
    )


def test_a_roc_curve_of_perfect_scores_is_a_corner():
    truth = np.array([False, True, True])
    curve = roc_at_grid(truth, np.array([0.1, 0.8, 0.9]))
    assert curve[0] == 0
    assert (curve[1:] == 1).all()


def test_the_confusion_matrix_is_the_sum_over_units(one):
    counts = confusion(one, 100.0)
    assert counts.sum() == sum(unit.n_test for unit in one.evaluation.units)
    right = sum(unit.metrics.accuracy * unit.n_test for unit in one.evaluation.units)
    assert np.trace(counts) == pytest.approx(right)


def test_the_bins_of_a_reliability_diagram_hold_every_image_and_weigh_them(one):
    _, confidence, accuracy, n = reliability(one, 100.0)
    assert n.sum() == sum(unit.n_test for unit in one.evaluation.units)
    top = one.predictions.scores_RK.max(axis=1)
    right = one.predictions.scores_RK.argmax(axis=1) == one.predictions.label_R
    filled = n > 0
    assert (confidence[filled] * n[filled]).sum() == pytest.approx(top.sum())
    assert (accuracy[filled] * n[filled]).sum() == pytest.approx(right.sum())


def test_intervals_of_classes_hold_the_value_and_are_of_the_mean_over_units(one):
    bounds = class_intervals(one, 100.0, resamples=100)
    for metric, pairs in bounds.items():
        for value, (low, high) in zip(class_values(one, 100.0, metric), pairs, strict=True):
            assert low <= value <= high
            assert high - low < 0.5
    mean = np.mean(class_values(one, 100.0, "sensitivity"))
    assert mean == pytest.approx(summary_at(one.evaluation, 100.0).mean["balanced_accuracy"])


def test_methods_have_colours_of_their_own_and_untrained_ones_are_gray():
    names = [f"m{k}" for k in range(8)] + ["random"]
    found = looks(names, ["random"])
    assert len({(look.colour, str(look.dash), look.marker) for look in found.values()}) == 9
    assert [found[name].colour for name in names[:6]] == list(PALETTE)
    assert found["random"].colour == UNTRAINED


def test_pretrainings_of_one_recipe_have_its_colour_and_lines_of_their_own():
    found = looks(["dino", "other", "dino_0", "dino_1"], families={"dino": ["dino_0", "dino_1"]})
    assert found["dino_0"].colour == found["dino_1"].colour == found["dino"].colour != found["other"].colour
    assert found["dino_0"].dash != found["dino_1"].dash


def test_a_figure_has_no_date_and_no_version_in_it():
    def once() -> drawing.Picture:
        with panel() as (figure, axes):
            axes.plot([0, 1], [0, 1], label="a")
            return finished(figure, "name", caption="", alt="")

    first, second = once(), once()
    assert (first.png, first.svg) == (second.png, second.svg)
    assert first.svg is not None
    assert b"<dc:date>" not in first.svg
    with Image.open(io.BytesIO(first.png)) as image:
        assert "Software" not in image.info
        assert image.mode == "P"


def test_long_curves_are_thinned_to_means():
    steps, values = thinned([(step, float(step)) for step in range(1000)], most=100)
    assert len(steps) == 100
    assert np.mean(values) == pytest.approx(499.5)
    assert steps[-1] == 999
