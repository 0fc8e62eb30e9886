"""Where numbers come from, what they cost and how they look: the files that a run leaves beside its metrics."""

import json
import math
import subprocess
from importlib.metadata import version

import pytest
import torch
from PIL import Image

import medpretrain
from data_prep.errors import UserError
from medpretrain.recipe_file import load_recipe
from medpretrain.tracking import provenance
from medpretrain.tracking.curves import draw_curves
from medpretrain.tracking.of_run import RunTracking
from medpretrain.tracking.provenance import dataset_hashes, write_provenance
from medpretrain.tracking.state import RunState
from medpretrain.tracking.system import system_metrics
from tests.tracking.runs import history, write


@pytest.fixture
def recipe(run):
    return load_recipe("simclr", [f"run.dir={run}", "data.path=[shards/a,s3://me:s3cr3t-w0rd@host/b]"])


def starts(run):
    return json.loads((run / "provenance.json").read_text())["starts"]


def test_each_start_is_kept_with_code_data_and_command_but_no_secret(run, recipe, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    command = ["medpretrain", "train", "simclr", "tracking.uri=http://me:s3cr3t-w0rd@host", "x=0123456789abcdef"]
    write_provenance(run, recipe, ["1" * 64, "2" * 64], world_size=4, command=command)
    files = write_provenance(run, recipe, ["1" * 64, "2" * 64], world_size=2)
    first, second = starts(run)
    assert (first["world_size"], second["world_size"]) == (4, 2)
    assert first["command"] == "medpretrain train simclr tracking.uri=http://***@host x=***"
    assert first["datasets"] == [
        {"path": "shards/a", "sha256": "1" * 64},
        {"path": "s3://***@host/b", "sha256": "2" * 64},
    ]
    assert (first["recipe_sha256"], first["medpretrain"]) == (recipe.sha256, medpretrain.__version__)
    assert dataset_hashes(run) == ["1" * 64, "2" * 64]
    assert [file.name for file in files] == ["provenance.json", "environment.txt"]
    everything = "".join(file.read_text() for file in files)
    assert "s3cr3t" not in everything
    assert "0123456789abcdef" not in everything


def test_the_environment_is_the_lock_of_what_ran_and_an_earlier_one_stays(run, recipe):
    write_provenance(run, recipe, ["1", "2"], world_size=1)
    lines = (run / "environment.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages == sorted(packages)
    assert f"torch=={version('torch')}" in packages
    assert lines[0].startswith("# python 3.")
    (run / "environment.txt").write_text("# python 3.1\n")
    files = write_provenance(run, recipe, ["1", "2"], world_size=1)
    assert (run / "environment-1.txt").read_text() == "# python 3.1\n"
    assert (run / "environment.txt").read_text().splitlines() == lines
    assert run / "environment-1.txt" in files


def test_the_commit_is_that_of_a_checkout_and_of_no_other_repository(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first")
    clean = provenance._git(tmp_path)
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("")
    assert provenance._git(tmp_path)["dirty"] is True
    assert provenance._git(tmp_path / "new") is None  # packages installed inside somebody's repository


def test_the_commit_in_an_image_is_what_it_was_built_from(run, recipe, monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda root: None)
    for said in (None, "unknown", "0123abc"):
        if said:
            monkeypatch.setenv("MEDPRETRAIN_REVISION", said)
        write_provenance(run, recipe, ["1", "2"], world_size=1)
    starts = json.loads((run / "provenance.json").read_text())["starts"]
    assert [start["git"] for start in starts] == [None, None, {"commit": "0123abc", "dirty": None}]


def test_a_broken_provenance_file_is_named(run, recipe):
    (run / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"provenance\.json"):
        write_provenance(run, recipe, ["1", "2"], world_size=1)


def test_the_system_is_measured_in_numbers_for_a_row(run):
    system_metrics(run)
    torch.randn(300, 300) @ torch.randn(300, 300)
    measured = system_metrics(run)
    assert list(measured) == ["system/cpu_percent", "system/memory_gib", "system/disk_free_gib"]
    assert 0.05 < measured["system/memory_gib"] < 100
    assert all(type(value) is float and math.isfinite(value) for value in measured.values())


def test_curves_are_drawn_of_what_was_measured_and_are_the_same_bytes_again(run):
    write(run, range(700), lr=0.1, grad_norm=math.nan, images_per_s=80.0)
    png, svg = draw_curves(run)
    with Image.open(png) as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    text = svg.read_text()
    assert text.count('id="axes_') == 3  # no panel for a gradient that was never finite, nor for RankMe
    before = [file.read_bytes() for file in (png, svg)]
    assert [file.read_bytes() for file in draw_curves(run)] == before
    assert not list(run.glob(".tmp-*"))


def test_there_are_no_curves_without_numbers(run):
    write(run, [1], value=lambda step: None)
    assert draw_curves(run) == []


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_tracked_run_ends_with_its_status_and_all_its_files(run, database, recipe, error, status):
    mlflow = pytest.importorskip("mlflow", reason="the train extra brings it")
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": database})})
    tracking = RunTracking(recipe, ["1" * 64, "2" * 64], world_size=1)
    write(run, range(3))
    tracking.__exit__(error, None, None)
    tracking.close("FAILED")  # a second call changes nothing
    assert RunState.of(run).status == status
    (found,) = mlflow.MlflowClient(database).search_runs(
        [mlflow.MlflowClient(database).get_experiment_by_name("medpretrain").experiment_id], max_results=1
    )
    assert found.info.status == status
    assert found.data.params["dataset_sha256.1"] == "2" * 64
    names = {file.path for file in mlflow.MlflowClient(database).list_artifacts(found.info.run_id)}
    assert names == {"recipe.yaml", "provenance.json", "environment.txt", "curves.png", "curves.svg"}
    assert len(history(run, database)) == 3
