"""What a user gets wrong is one line, exit code 2, and nothing half-written."""

from __future__ import annotations

import shutil

import pytest

from medpretrain.checkpoints import at
from medpretrain.tracking.metrics_log import read_metrics

RECIPE = """\
name: small
data: {{path: {dataset}, channels: 1, labels: [modality, anatomy], threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, count: 2, crop: [0.3, 1]}}}}
method: {{name: modan_mulsupcon}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 3, global_batch: 8, log_every: 1}}
checkpoint: {{every: 2}}
tracking: {{uri: none}}
"""


@pytest.fixture
def recipe(tmp_path, small_dataset):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(dataset=small_dataset))
    return path


def refused(result, *words):
    code, _, errors = result
    assert code == 2, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["lrr", "'lr'"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("data.path=nowhere", ["nowhere"]),
        ("train.global_batch=4000", ["global_batch=4000", "samples"]),
        ("backbone.name=resnet81", ["resnet81", "did you mean"]),
        ("backbone={name: vit_tiny_patch16_224, stem: 3x3}", ["stem", "vit_tiny"]),
        ("data.labels=[moodality]", ["moodality", "modality"]),
        ("data.split=tran", ["tran", "train"]),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(override, words, medpretrain, recipe, tmp_path):
    refused(medpretrain("train", recipe, override, f"run.dir={tmp_path / 'run'}"), *words)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(medpretrain, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refused(medpretrain("train", recipe, "device=cuda", f"run.dir={tmp_path / 'run'}"), "device=cpu")


def test_train_resume_evaluate_export_and_what_is_refused_on_the_way(medpretrain, recipe, tmp_path, small_dataset):
    run, out = tmp_path / "run", tmp_path / "out"
    assert medpretrain("train", recipe, f"run.dir={run}")[0] == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    code, text, _ = medpretrain("train", recipe, f"run.dir={run}")  # it has ended: nothing to do
    assert code == 0
    assert "3 steps done" in text

    refused(medpretrain("train", recipe, f"run.dir={run}", "optim.lr=0.02"), "optim.lr was 0.01 and is 0.02")
    refused(medpretrain("train", recipe, f"run.dir={run}", "--resume", "never"), "--resume never")
    code, _, said = medpretrain("evaluate", "kn", run, small_dataset)
    assert (code, "No such command 'kn'" in said) == (2, True)
    refused(medpretrain("evaluate", "knn", run, tmp_path), str(tmp_path))
    refused(medpretrain("evaluate", "knn", tmp_path / "none", small_dataset), "is no run: say with --out")
    refused(medpretrain("evaluate", "knn", "random:resnet81", small_dataset, "--out", out), "did you mean 'resnet18'")
    refused(medpretrain("evaluate", "linear", run, small_dataset, "--variant", "exat"), "did you mean 'exact'")
    refused(medpretrain("evaluate", "knn", run, small_dataset, "--fractions", "1,x"), "--fractions: 'x' is no number")
    refused(medpretrain("evaluate", "knn", run, small_dataset, "--baseline", "imagenet"), "'random'")
    refused(medpretrain("evaluate", "knn", run, small_dataset, "--label", "clas"), "'class'")

    code, text, _ = medpretrain("evaluate", "knn", run, small_dataset, "--baseline", "random", "--k", "5")
    assert code == 0
    assert "accuracy" in text
    assert len(list((run / "evaluation").glob("knn-weighted-class-*.evaluation.json"))) == 2  # the run and its random
    code, _, _ = medpretrain("report", run, tmp_path / "page", "--no-images")
    assert code == 0
    assert "knn" in (tmp_path / "page" / "index.html").read_text().lower()
    refused(medpretrain("report", run, tmp_path / "page"), "--overwrite")
    one = run / "checkpoints" / "step-00000003"
    assert medpretrain("evaluate", "knn", one, small_dataset)[0] == 0
    at(one)  # nothing was written into it
    assert medpretrain("evaluate", "linear", run, small_dataset, "--label", "modality")[0] == 0
    assert "IR" in medpretrain("evaluate", "imbalance", small_dataset)[1]

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    refused(medpretrain("export", run, tmp_path / "theirs"), "theirs")
    refused(medpretrain("train", recipe, f"run.dir={tmp_path / 'theirs'}"), "not a run")
    refused(medpretrain("train", recipe, f"run.dir={tmp_path / 'theirs'}", "--resume", one), "not a run")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]
    assert medpretrain("export", run, out, "--forms", "timm")[0] == 0
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in out.iterdir()}
    refused(medpretrain("export", run, out), "overwrite")
    assert medpretrain("export", run, out, "--overwrite", "--forms", "timm")[0] == 0


def test_a_checkpoint_of_another_dataset_is_refused(medpretrain, recipe, tmp_path, small_dataset):
    from data_prep.images import prepare

    run = tmp_path / "run"
    assert medpretrain("train", recipe, f"run.dir={run}")[0] == 0
    images = small_dataset.parent / "images"
    prepare(images, tmp_path / "other", labels=str(small_dataset.parent / "labels.yaml"), split={"train": 1.0})
    normal = ["data.mean=[0.4]", "data.std=[0.3]"]
    other = tmp_path / "run2"
    assert medpretrain("train", recipe, f"run.dir={other}", *normal)[0] == 0
    refused(
        medpretrain("train", recipe, f"run.dir={other}", f"data.path={tmp_path / 'other'}", *normal), "another dataset"
    )


def test_an_index_that_does_not_match_its_shards_is_refused(medpretrain, recipe, tmp_path, small_dataset):
    broken = tmp_path / "broken"
    shutil.copytree(small_dataset, broken)
    shard = sorted((broken / "shards").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    refused(medpretrain("train", recipe, f"data.path={broken}", f"run.dir={tmp_path / 'run'}"), shard.name)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_code_1_and_the_cure(medpretrain, recipe, tmp_path):
    code, _, errors = medpretrain("train", recipe, f"run.dir={tmp_path / 'run'}", "optim.lr=1e38", "train.steps=9")
    assert code == 1
    assert "optim.lr" in errors
    assert "Traceback" not in errors


def test_damaged_checkpoints_are_passed_over_and_never_trained_over(medpretrain, recipe, tmp_path, caplog):
    run = tmp_path / "run"
    assert medpretrain("train", recipe, f"run.dir={run}")[0] == 0
    newest = run / "checkpoints" / "step-00000003" / "rank-00000-of-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    assert medpretrain("train", recipe, f"run.dir={run}")[0] == 0
    assert "step-00000003" in caplog.text
    assert [path.name for path in (run / "checkpoints" / "aside").iterdir()] == ["step-00000003-1"]
    for path in (run / "checkpoints").glob("step-*/rank-*"):
        path.write_bytes(b"")
    for _ in range(2):
        refused(medpretrain("train", recipe, f"run.dir={run}"), "whole")


def test_recipes_are_listed_and_shown(medpretrain):
    code, text, _ = medpretrain("recipes")
    assert code == 0
    assert "amimv_medmnist" in text
    code, text, _ = medpretrain("recipes", "show", "amimv_medmnist", "optim.lr=0.1")
    assert code == 0
    assert "lr: 0.1" in text
