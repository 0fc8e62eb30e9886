"""What tells a healthy representation from a collapsing one, and when the alarm is raised."""

from __future__ import annotations

import itertools
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.data.batches import Batch
from medpretrain.methods.base import TrainingSet
from medpretrain.methods.simclr import SimClr, SimClrOptions
from medpretrain.recipe import Recipe
from medpretrain.tracking.metrics_log import read_metrics
from medpretrain.training.build import build_backbone
from medpretrain.training.collapse import (
    IMAGES,
    CollapseAlarm,
    alignment,
    feature_std,
    of_global_batch,
    rankme,
    representation,
    uniformity,
)
from medpretrain.training.loop import train
from medpretrain.training.process import Process
from medpretrain.training.trainer import Trainer

ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
CURE = "a lower optim.lr is the usual cure"
HEALTHY = {"feature_std": 0.7, "rankme": 31.0, "alignment": 0.6, "uniformity": -1.4}


def features(seed, images, width, views=2):
    torch.manual_seed(seed)
    return torch.randn(images, views, width)


def by_hand(features_NVD):
    """Every measure in plain loops, RankMe by NumPy's SVD of the features themselves."""
    units = []
    for image in features_NVD.double():
        units.append([[float(x) / math.sqrt(sum(float(y) ** 2 for y in view)) for x in view] for view in image])
    images, width = len(units), len(units[0][0])

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    deviations = []
    for k in range(width):
        column = [unit[0][k] for unit in units]
        mean = sum(column) / images
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / images))
    pairs = list(itertools.combinations(range(images), 2))
    potential = sum(math.exp(-2 * squared(units[i][0], units[j][0])) for i, j in pairs) / len(pairs)
    singular = np.linalg.svd(features_NVD[:, 0].double().numpy(), compute_uv=False)
    entropy = 0.0
    for s in singular:
        p = s / sum(singular) + 1e-7
        entropy -= p * math.log(p)
    return {
        "feature_std": sum(deviations) / width * math.sqrt(width),
        "rankme": math.exp(entropy),
        "uniformity": math.log(potential),
        "alignment": sum(squared(unit[0], unit[1]) for unit in units) / images,
    }


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000), images=st.integers(2, 9), width=st.integers(1, 12), offset=st.sampled_from([0.0, 3.0])
)
def test_each_measure_equals_its_definition(seed, images, width, offset):
    """With more images than dimensions, and fewer; centred, and far from the origin."""
    some = features(seed, images, width) + offset
    found = representation(some)
    for name, expected in by_hand(some).items():
        assert found.pop(name) == pytest.approx(expected, rel=1e-5, abs=1e-9), name
    assert not found


def test_rankme_counts_the_dimensions_that_are_filled():
    torch.manual_seed(0)
    directions_KD = torch.linalg.qr(torch.randn(40, 7))[0].T
    assert rankme(directions_KD).item() == pytest.approx(7, rel=1e-4)
    assert rankme(directions_KD.repeat(30, 1)).item() == pytest.approx(7, rel=1e-3)  # 210 images, 40 dimensions
    assert rankme(1e-9 * directions_KD).item() == pytest.approx(7, rel=1e-4)  # whatever the scale
    assert rankme(1e30 * directions_KD).item() == pytest.approx(7, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e20])
def test_constant_features_have_no_spread_and_one_dimension(value):
    found = representation(torch.full((40, 2, 16), value))
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["rankme"] == pytest.approx(1, abs=1e-3)
    assert found["alignment"] == 0
    assert found["uniformity"] == pytest.approx(0, abs=1e-9)


def test_spread_out_features_have_a_deviation_of_about_one():
    assert feature_std(features(0, 512, 64)[:, 0]).item() == pytest.approx(1.0, abs=0.05)


def test_duplicated_images_count_as_alike():
    some = features(0, 6, 32)
    twice = representation(torch.cat([some, some]))
    assert twice["rankme"] == pytest.approx(representation(some)["rankme"], rel=1e-3)
    assert twice["uniformity"] > representation(some)["uniformity"]  # 6 pairs of 66 are at distance 0


def test_one_view_has_no_alignment_and_one_image_nothing_else():
    assert representation(features(0, 5, 8, views=1)).keys() == {"feature_std", "rankme", "uniformity"}
    assert representation(features(0, 1, 8)).keys() == {"alignment"}
    assert representation(features(0, 1, 8, views=1)) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_told_and_raises_the_alarm(value):
    some = features(0, 20, 8)
    some[3, :, 2] = value
    found = representation(some)
    assert len(found) == 4
    assert all(math.isnan(measure) for measure in found.values())
    assert "COLLAPSE" in CollapseAlarm(CURE).update({"step": 1} | found)


def test_measures_of_bf16_features_are_those_of_their_values():
    some = features(0, 20, 8).bfloat16()
    assert representation(of_global_batch(some)) == representation(some.float())


def test_no_more_is_gathered_than_is_measured():
    assert of_global_batch(torch.zeros(2 * IMAGES, 5, 3)).shape == (IMAGES, 2, 3)
    assert of_global_batch(torch.zeros(7, 1, 3)).shape == (7, 1, 3)


@pytest.mark.parametrize(("function", "arguments"), [(feature_std, 1), (rankme, 1), (uniformity, 1), (alignment, 2)])
def test_no_measure_rounds_in_float32(function, arguments):
    some = features(0, 12, 6)
    given = [some[:, view] for view in range(arguments)]
    assert function(*given).item() == function(*[one.double() for one in given]).item()


def test_a_healthy_row_raises_nothing():
    alarm = CollapseAlarm(CURE)
    assert alarm.update({"step": 10} | HEALTHY) == ""
    assert alarm.update({"step": 20, "feature_std": 0.05, "rankme": 4.0, "alignment": 0.05, "uniformity": -0.4}) == ""
    assert alarm.update({"step": 30, "feature_std": 0.1, "rankme": 4.0, "alignment": 0.3, "uniformity": -0.01}) == ""
    assert alarm.update({"step": 40}) == ""


@pytest.mark.parametrize("std", [0.03, 0.0, math.nan])
def test_a_fallen_deviation_raises_the_alarm_with_from_and_to(std):
    alarm = CollapseAlarm(CURE)
    alarm.update({"step": 10, "feature_std": 0.6})
    alarm.update({"step": 20, "feature_std": 0.71})
    alarm.update({"step": 30, "feature_std": 0.5})
    assert alarm.update({"step": 40, "feature_std": std}) == (
        f"COLLAPSE: feature std fell from 0.71 to {std:.3g}; {CURE}"
    )


def test_what_has_been_small_from_the_start_has_not_fallen_but_is_told():
    assert CollapseAlarm(CURE).update({"step": 10, "feature_std": 0.01}) == f"COLLAPSE: feature std is 0.01; {CURE}"


@pytest.mark.parametrize(
    ("most", "now", "raised"),
    [
        (31.0, 3.9, True),  # below a tenth of 30 above the one dimension of a constant
        (31.0, 4.1, False),
        (200.0, 4.9, True),
        (200.0, 5.1, False),  # a fall, but five dimensions are left
        (5.0, 1.5, False),  # a batch of few images has few dimensions
        (5.0, 1.3, True),
    ],
)
def test_rank_raises_the_alarm_where_it_is_low_and_has_fallen(most, now, raised):
    alarm = CollapseAlarm(CURE)
    alarm.update({"step": 10, "rankme": most})
    text = alarm.update({"step": 20, "rankme": now})
    assert text == (f"COLLAPSE: RankMe fell from {most:.3g} to {now:.3g}; {CURE}" if raised else "")
    assert CollapseAlarm(CURE).update({"step": 20, "rankme": now}) == ""  # with no row before there is no fall


def test_rank_does_not_count_for_methods_that_draw_classes_together():
    alarm = CollapseAlarm(CURE, by_rank=False)
    alarm.update({"step": 10} | HEALTHY)
    assert alarm.update({"step": 20} | HEALTHY | {"rankme": 1.4}) == ""
    assert alarm.update({"step": 30} | HEALTHY | {"feature_std": 0.04})


def test_views_that_agree_are_no_alarm_unless_all_images_do():
    alarm = CollapseAlarm(CURE)
    alarm.update({"step": 10} | HEALTHY)
    assert alarm.update({"step": 20} | HEALTHY | {"alignment": 0.001}) == ""
    assert alarm.update({"step": 30} | HEALTHY | {"alignment": 0.001, "uniformity": -0.02}) == (
        f"COLLAPSE: alignment fell from 0.6 to 0.001, uniformity rose from -1.4 to -0.02; {CURE}"
    )


def test_two_classes_each_drawn_into_a_point_raise_nothing():
    """The end of a supervised run: 20 of 400 images in one class, all at right angles to the others."""
    some = torch.zeros(400, 2, 16)
    some[:20, :, 0] = some[20:, :, 1] = 1.0
    assert CollapseAlarm(CURE, by_rank=False).update({"step": 10} | representation(some)) == ""


def test_the_alarm_is_logged_when_it_begins_and_not_at_each_row(caplog):
    alarm = CollapseAlarm(CURE)
    rows = [0.7, 0.01, 0.01, 0.02, 0.6, 0.01]
    with caplog.at_level(logging.WARNING):
        shown = [alarm.update({"step": step, "feature_std": std}) for step, std in enumerate(rows)]
    assert [bool(text) for text in shown] == [False, True, True, True, False, True]
    assert [record.getMessage() for record in caplog.records] == [f"step 1: {shown[1]}", f"step 5: {shown[5]}"]


def test_a_resumed_run_remembers_what_its_earlier_rows_were(caplog):
    earlier = [{"step": 10} | HEALTHY, {"step": 20, "loss": 1.0}, {"step": 30} | HEALTHY | {"rankme": 1.6}]
    alarm = CollapseAlarm(CURE, earlier=earlier)
    assert not caplog.records
    assert alarm.update({"step": 40} | HEALTHY | {"rankme": 1.5}) == f"COLLAPSE: RankMe fell from 31 to 1.5; {CURE}"


class Attraction(SimClr):
    """Views attract each other and nothing holds images apart."""

    def loss(self, outputs, batch, progress):
        return (outputs["z"][:, 0] - outputs["z"][:, 1]).square().sum(dim=1).mean()


@pytest.mark.parametrize("method", [SimClr, Attraction])
def test_a_run_that_collapses_raises_the_alarm_and_a_healthy_one_does_not(method):
    recipe = Recipe.model_validate(
        {
            "name": "one",
            "data": {"channels": 1},
            "backbone": {"name": "test_vit"},
            "views": {"crop": {"size": 32, "count": 2}},
            "method": {"name": "simclr"},
            "optim": {"name": "adamw", "lr": 3e-3},
            "train": {"steps": 40, "global_batch": 32},
        }
    )
    trained = method(SimClrOptions(projector=(16,)), build_backbone(recipe), TrainingSet(32))
    trainer = Trainer(trained, recipe, ALONE, total=40, steps_per_epoch=1.0)
    torch.manual_seed(0)
    images = torch.randn(32, 1, 32, 32)
    alarm, raised = CollapseAlarm(method.collapse_causes), []
    for step in range(40):
        views = {"crop": [images + 0.5 * torch.randn_like(images) for _ in range(2)]}
        batch = Batch(step, seed=0, size=32, first=0, micro=[views], labels={}, samples=torch.arange(32))
        measured = trainer.step(batch)
        row = {"step": step + 1} | representation(of_global_batch(measured.features))
        raised.append(alarm.update(row))
    assert any(raised) == (method is Attraction)
    assert bool(raised[-1]) == (method is Attraction)


def test_dino_without_centring_collapses_in_a_run_and_is_told_again_when_resumed(tmp_path, small_dataset, caplog):
    run = tmp_path / "run"
    recipe = Recipe.model_validate(
        {
            "name": "uncentred",
            "device": "cpu",
            "data": {"path": str(small_dataset), "channels": 1, "threads": 1},
            "backbone": {"name": "test_vit"},
            "views": {"global": {"size": 32, "count": 2, "crop": [0.4, 1.0]}},
            "method": {
                "name": "dino",
                "prototypes": 32,
                "hidden": 32,
                "bottleneck": 16,
                "freeze_last_layer_epochs": 0.0,
                "center_momentum": 1.0,
                "teacher_temperature": 0.1,
                "teacher_momentum": 0.5,
            },
            "optim": {"name": "adamw", "lr": 3e-3},
            "train": {"steps": 24, "global_batch": 24, "threads": 1, "log_every": 1},
            "checkpoint": {"every": 12},
            "run": {"dir": str(run)},
            "tracking": {"uri": "none"},
        }
    )
    finished = train(recipe)
    rows = read_metrics(run / "metrics.jsonl")
    assert all(HEALTHY.keys() <= row.keys() for row in rows)
    most = f"RankMe fell from {max(row['rankme'] for row in rows):.3g}"
    begun = [record.getMessage() for record in caplog.records if "COLLAPSE" in record.getMessage()]
    assert most in begun[0]
    assert "method.center_momentum" in begun[0]
    assert len(begun) < 4  # not at each row

    shutil.rmtree(finished.checkpoint)
    caplog.clear()
    train(recipe)
    again = [record.getMessage() for record in caplog.records if "COLLAPSE" in record.getMessage()]
    assert again[0].startswith("step 13: COLLAPSE")
    assert most in again[0]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 25))
