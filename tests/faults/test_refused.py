"""What a run cannot go on from is refused in one line that shows the difference, and nothing on disk has changed."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from medpretrain.checkpoints import manifest as manifests
from medpretrain.recipe_file import load_recipe
from medpretrain.training import loop
from medpretrain.training.process import Process
from tests.faults.running import committed, steps, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_dataset):
    """A recipe, and a run of its 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, small_dataset, steps=4)
    loop.train(load_recipe(str(recipe), [f"run.dir={folder / 'run'}", "checkpoint.every=2"]))
    return recipe, folder / "run"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refusal(trained, tmp_path):
    """refusal(*overrides, resume=, override=): what training says of a copy of the run; no byte of it changes."""
    recipe, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def said(*overrides, resume="auto", override=(), folder=copy):
        before = contents(tmp_path)
        with pytest.raises(UserError) as error:
            loop.train(load_recipe(str(recipe), [f"run.dir={folder}", *overrides]), resume, override)
        assert contents(tmp_path) == before
        text = str(error.value)
        assert "\n" not in text
        return text

    said.run = copy
    return said


def test_another_recipe_shows_its_keys_and_what_to_add(refusal):
    said = refusal("optim.lr=0.02", "train.steps=8")
    assert "is of another recipe: optim.lr was 0.01 and is 0.02, train.steps was 4 and is 8; " in said
    assert "to go on all the same add --override optim.lr --override train.steps, or set another run.dir" in said


def test_one_of_several_keys_that_is_named_is_not_enough(refusal):
    said = refusal("optim.lr=0.02", "train.steps=8", override=["train.steps"])
    assert "optim.lr was 0.01 and is 0.02; to go on all the same add --override optim.lr, or" in said


def test_what_changes_the_networks_cannot_be_overridden(refusal):
    said = refusal("backbone.name=test_vit", "optim.name=adamw", "seed=3", "views.crop.size=16", "views.crop.flip=0")
    assert "seed was 0 and is 3, backbone.name was 'test_resnet' and is 'test_vit'" in said
    assert " and 1 more; set another run.dir" in said
    for key in ("method.name", "optim.name"):
        said = refusal("optim.name=adamw", override=[key])
        assert said.startswith(f"--override {key}: what may differ is optim., train.steps, train.epochs, ")


def test_what_is_overridden_is_trained(trained, tmp_path):
    recipe, run = trained
    shutil.copytree(run, tmp_path / "run")
    changed = load_recipe(str(recipe), [f"run.dir={tmp_path / 'run'}", "optim.lr=0.02", "train.steps=6"])
    assert loop.train(changed, override=["optim.lr", "train.steps"]).step == 6
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_another_dataset_is_named_with_what_was_seen(refusal, colour_dataset):
    said = refusal(f"data.path={colour_dataset}")
    assert "is of another dataset: it has seen " in said
    assert f"and data.path is {colour_dataset} (" in said


def test_a_newer_format_asks_for_a_newer_medpretrain_and_is_not_passed_over(refusal):
    file = refusal.run / "checkpoints" / "step-00000004" / manifests.MANIFEST
    plain = json.loads(file.read_text()) | {"format": manifests.FORMAT + 1}
    file.write_text(json.dumps(plain | {"checksum": manifests._checksum(plain)}))
    said = refusal()
    assert said.startswith(f"{file} has format {manifests.FORMAT + 1} and this version reads up to {manifests.FORMAT}")
    assert "it needs a newer medpretrain" in said


def test_a_number_of_processes_that_does_not_divide_the_batch(refusal, monkeypatch):
    @contextlib.contextmanager
    def joined(*_, **__):
        yield Process(rank=0, world=3, local_rank=0, local_world=3, device=torch.device("cpu"))

    monkeypatch.setattr(loop, "joined", joined)
    assert "train.global_batch=8 is not divisible by 3 processes x 1 micro-batches" in refusal()


def test_folders_without_a_checkpoint_are_nothing_to_resume_from(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(refusal.run / "recipe.yaml", begun)
    new = tmp_path / "new"
    assert refusal(resume=str(tmp_path / "empty")) == f"{tmp_path / 'empty'} is neither a run nor a checkpoint"
    assert refusal(resume=str(tmp_path / "nowhere")) == f"there is no checkpoint at {tmp_path / 'nowhere'}"
    assert refusal(resume=str(begun)) == f"the run in {begun} has no whole checkpoint"
    assert refusal(resume=str(begun), folder=new) == f"the run in {begun} has no whole checkpoint"
    gone = refusal.run / "checkpoints" / "step-00000003"
    assert refusal(resume=str(gone)) == f"there is no checkpoint at {gone}"
    assert committed(refusal.run) == [2, 4]


def test_a_run_folder_that_is_a_file(refusal, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refusal(folder=tmp_path / "file") == f"run.dir={tmp_path / 'file'} is a file"
