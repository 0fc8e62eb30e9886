"""If these fail, the table or the figure of a sweep shows something else than was measured."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from data_prep.errors import UserError
from medpretrain.evaluation.results import SUFFIX
from medpretrain.sweep.expand import expand
from medpretrain.sweep.figure import draw
from medpretrain.sweep.folder import Folder, planned
from medpretrain.sweep.results import csv_rows, points, results_of, table, write_results
from medpretrain.sweep.sweep_file import Sweep

EXACT = [{"protocol": "linear", "variant": "exact"}]
SERIES = "linear (exact), class of d, 100 % of labels"


@pytest.fixture
def filled(tmp_path, evaluation):
    """filled(accuracies, **sweep) -> the folder of a sweep whose runs have them, None: not done."""

    def filled(accuracies, fractions=(100.0,), **content) -> Folder:
        content = {"name": "mine", "recipe": "simclr_medmnist", "evaluate": EXACT, **content}
        folder, sweep = Folder(tmp_path / "out"), Sweep.model_validate(content)
        runs = expand(sweep)
        folder.write_plan(sweep, runs)
        for run, accuracy in zip(runs, accuracies, strict=True):
            if accuracy is not None:
                write(folder, run, evaluation(accuracy, fractions))
        return folder

    return filled


def write(folder: Folder, run, evaluation) -> None:
    folder.evaluations(run.name).mkdir(parents=True)
    (folder.run(run.name) / "recipe.yaml").write_text("x")
    folder.mark_trained(planned(run))
    name = f"linear{SUFFIX}"
    (folder.evaluations(run.name) / name).write_text(evaluation.model_dump_json())
    folder.mark_evaluated(planned(run), "linear --label class --variant exact", [name])


def grid(values, name="epochs"):
    return [{"name": name, "set": ["train.epochs={}"], "values": values}]


def test_the_csv_has_a_line_for_each_run_and_fraction_and_for_a_run_without_results(filled):
    folder = filled([0.7, None], fractions=(10.0, 100.0), grid=grid([1, 2]))
    write_results(folder, results_of(folder))
    lines = list(csv.DictReader((folder.path / "sweep.csv").open()))
    assert [(line["run"], line["state"], line["epochs"], line["fraction"], line["accuracy"]) for line in lines] == [
        ("epochs-1", "done", "1", "10.0", "0.7"),
        ("epochs-1", "done", "1", "100.0", "0.7"),
        ("epochs-2", "not done", "2", "", ""),
    ]
    assert (float(lines[0]["accuracy_low"]), float(lines[0]["accuracy_high"])) == pytest.approx((0.65, 0.74))
    assert lines[0]["auroc_low"] == ""
    content = json.loads((folder.path / "sweep.json").read_text())
    assert content["rows"][0]["measured"][0]["mean"]["accuracy"] == 0.7


def test_the_results_are_a_function_of_the_folder(filled):
    folder = filled([0.7, 0.8], grid=grid([1, 2]))
    write_results(folder, results_of(folder))
    draw(folder, results_of(folder))
    names = ("sweep.csv", "sweep.json", "sweep.png", "sweep.svg")
    first = [(folder.path / name).read_bytes() for name in names]
    for name in names:
        (folder.path / name).unlink()
    write_results(folder, results_of(folder))
    draw(folder, results_of(folder))
    assert [(folder.path / name).read_bytes() for name in names] == first


def test_a_point_is_the_mean_over_seeds_with_their_deviation_and_of_one_its_interval(filled):
    folder = filled([0.6, 0.8, 0.5, None], grid=grid([1, 2]), seeds=[0, 1])
    one, other = points(results_of(folder), SERIES)
    assert (one.axes, one.seeds) == ({"epochs": 1}, 2)
    assert one.value == pytest.approx(0.7)
    assert one.high - one.value == pytest.approx(math.sqrt(2 * 0.1**2))
    assert (other.axes, other.seeds, other.value) == ({"epochs": 2}, 1, 0.5)
    assert (other.low, other.high) == pytest.approx((0.45, 0.54))


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"plan.json cannot be read"):
        results_of(Folder(tmp_path))


@pytest.mark.parametrize("how", ["together", "apart"])
def test_the_matrix_shows_each_pair_in_its_place(how, filled):
    names = ["crop", "flip"]
    values = {"together": [0.61, 0.72, 0.53], "apart": [0.61, 0.72, 0.44, 0.53]}[how]
    folder = filled(values, pairs={"how": how, "transformations": names})
    png, svg = draw(folder, results_of(folder))
    words = shown(svg)
    expected = {"together": ["0.610", "0.720", "0.720", "0.530"], "apart": ["0.610", "0.720", "0.440", "0.530"]}[how]
    assert [word for word in words if word in expected] == expected  # and not the ticks beside the colours
    assert pixels(png)


def test_bars_name_what_was_left_out_and_a_run_that_is_missing_has_none(filled):
    folder = filled([0.9, 0.8, None], leave_one_out={"transformations": ["crop", "blur"]})
    png, svg = draw(folder, results_of(folder))
    words = shown(svg)
    assert {"all transformations", "without crop", "0.900", "0.800"} <= set(words)
    assert "without blur" not in words
    assert pixels(png)


def test_a_line_for_each_recipe_and_fraction_along_the_numeric_axis(filled):
    recipes = ["simclr_medmnist", "barlow_twins_medmnist"]
    folder = filled([0.5, 0.6, 0.7, 0.8, 0.75, 0.9], fractions=(10.0, 100.0), recipe=recipes, grid=grid([1, 10, 100]))
    png, svg = draw(folder, results_of(folder))
    words = shown(svg)
    for recipe in recipes:
        for fraction in (10, 100):
            assert f"{recipe}, {fraction} % of labels" in words
    assert {"linear (exact), class of d", "epochs", "accuracy", "1", "10", "100"} <= set(words)
    assert pixels(png)


def test_cases_are_bars_with_their_names(filled):
    axis = {"name": "colour", "cases": {"strong": [], "light": ["views.crop.jitter=null"]}}
    folder = filled([0.9, 0.8], grid=[axis])
    assert {"colour strong", "colour light"} <= set(shown(draw(folder, results_of(folder))[1]))


def test_an_untrained_network_measured_beside_a_run_is_not_the_runs_result(filled, evaluation):
    folder = filled([0.9, 0.8], grid=grid([1, 2]))
    run = folder.plan().runs[0]
    there = evaluation(0.1)
    there = there.model_copy(update={"source": there.source.model_copy(update={"kind": "random"})})
    (folder.evaluations(run.name) / f"random{SUFFIX}").write_text(there.model_dump_json())
    folder.mark_evaluated(run, "linear --label class --variant exact", [f"linear{SUFFIX}", f"random{SUFFIX}"])
    assert [point.value for point in points(results_of(folder), SERIES)] == [0.9, 0.8]


def test_nothing_is_drawn_of_nothing(filled):
    folder = filled([None, None], grid=grid([1, 2]))
    assert draw(folder, results_of(folder)) == []
    assert len(csv_rows(results_of(folder))) == 3
    assert table(results_of(folder)).row_count == 2


def shown(svg: Path) -> list[str]:
    """The texts of a figure: matplotlib writes each as a comment before its glyphs."""
    import re

    return re.findall(r"<!-- (.+?) -->", svg.read_text())


def pixels(png: Path) -> bool:
    with Image.open(png) as image:
        return image.width > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
