"""What a report refuses, and what it puts into one table."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from medpretrain.evaluation import results
from medpretrain.report.gather import differences, gather
from tests.report.example import data, evaluated, write_run


@pytest.fixture
def folder(tmp_path):
    """A folder with one evaluation."""
    results.write(tmp_path / "one", *evaluated("simclr", repeats=1))
    return tmp_path / "one"


def edited(folder, change):
    """The JSON file of the folder's evaluation, changed."""
    (path,) = folder.glob(f"*{results.SUFFIX}")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_without_an_evaluation_is_refused_and_the_cure_named(tmp_path):
    run = write_run(tmp_path / "run", "simclr")
    with pytest.raises(UserError, match="run holds no evaluation; `medpretrain evaluate` makes one"):
        gather([run])
    with pytest.raises(UserError, match="there is no folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="at least one"):
        gather([])


def test_the_same_folder_twice_is_refused(folder):
    with pytest.raises(UserError, match="is given 2 times"):
        gather([folder, folder.parent / "one" / ".." / "one"])


def test_the_same_evaluation_of_the_same_weights_in_two_folders_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="are the same evaluation of the same weights; give one of them"):
        gather([folder, tmp_path / "copy"])


def test_an_evaluation_of_a_newer_version_is_refused(folder):
    edited(folder, lambda content: content.update(version=3))
    with pytest.raises(UserError, match="has version 3"):
        gather([folder])


def test_a_metric_that_is_not_finite_is_refused_and_named(folder):
    edited(folder, lambda content: content["summaries"][0]["mean"].update(auroc=float("nan")))
    with pytest.raises(UserError, match=r"not finite: summaries\.0\.mean\.auroc"):
        gather([folder])


def test_scores_that_are_not_finite_or_not_those_of_the_record_are_refused(folder):
    (path,) = folder.glob(f"*{results.PREDICTIONS}")
    table = pq.read_table(path)
    first, second = table.column("score_0"), table.column("score_1")
    place = table.column_names.index("score_0")
    swapped = table.set_column(place, "score_0", second).set_column(place + 1, "score_1", first)
    pq.write_table(swapped, path)
    with pytest.raises(UserError, match="are not those that it counts"):
        gather([folder])
    pq.write_table(table.set_column(place, "score_0", pc.divide(pa.scalar(0.0), pc.multiply(first, 0.0))), path)
    with pytest.raises(UserError, match="hold values that are not finite"):
        gather([folder])


def test_a_recipe_of_another_version_is_refused_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", "simclr")
    results.write(run / "evaluation", *evaluated("simclr", repeats=1))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "brand_new: 1\n")
    with pytest.raises(UserError, match=r"is no recipe of this version: brand_new"):
        gather([run])


def test_evaluations_that_differ_in_settings_are_in_groups_that_say_how(tmp_path):
    results.write(tmp_path / "a", *evaluated("simclr", repeats=1, parameters={"k": 20}))
    results.write(tmp_path / "b", *evaluated("mulsupcon", repeats=1, parameters={"k": 200}))
    results.write(tmp_path / "c", *evaluated("random", repeats=1, parameters={"k": 20}, kind="random"))
    found = gather([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert [[one.method.name for one in group.measured] for group in found.groups] == [
        ["simclr", "random"],
        ["mulsupcon"],
    ]
    assert list(differences(found.groups).values()) == [["parameter k: 20"], ["parameter k: 200"]]


def test_two_backbones_of_one_name_are_told_apart_by_their_hashes(tmp_path):
    evaluation, predictions = evaluated("simclr", repeats=1)
    results.write(tmp_path / "a", evaluation, predictions)
    source = evaluation.source.model_copy(update={"sha256": "c0ffee" + "0" * 58})
    results.write(tmp_path / "b", evaluation.model_copy(update={"source": source}), predictions)
    found = gather([tmp_path / "a", tmp_path / "b"])
    assert [method.name for method in found.methods] == [f"simclr {evaluation.source.sha256[:6]}", "simclr c0ffee"]
    assert found.notes


def test_an_untrained_backbone_comes_last_whatever_the_order(tmp_path):
    results.write(tmp_path / "a", *evaluated("random", repeats=1, kind="random"))
    results.write(tmp_path / "b", *evaluated("simclr", repeats=1))
    assert [method.name for method in gather([tmp_path / "a", tmp_path / "b"]).methods] == ["simclr", "random"]


def test_another_dataset_is_another_group(tmp_path):
    results.write(tmp_path / "a", *evaluated("simclr", repeats=1))
    results.write(tmp_path / "b", *evaluated("mulsupcon", repeats=1, record=data(sha256="f" * 64)))
    groups = gather([tmp_path / "a", tmp_path / "b"]).groups
    assert len(groups) == 2
    assert all("sha256: " in line for lines in differences(groups).values() for line in lines)
