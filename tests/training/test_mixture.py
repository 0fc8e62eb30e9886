"""A run on two datasets: it resumes exactly, says which data it saw, and is evaluated and exported like any other."""

from __future__ import annotations

import pytest
import torch

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.checkpoints import at, read
from medpretrain.evaluation.of_source import evaluate_source
from medpretrain.evaluation.protocols import Knn
from medpretrain.export.of_run import export_run
from medpretrain.recipe_file import load_recipe
from medpretrain.tracking import of_run
from medpretrain.training import loop
from medpretrain.training.build import load_run

RECIPE = """\
name: mixed
data:
  path: [{small}, {colour}]
  weights: [1, 1]
  labels: [modality, anatomy]
  threads: 1
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, count: 2, crop: [0.3, 1]}}}}
method: {{name: modan_mulsupcon}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 6, global_batch: 8, log_every: 1, threads: 1}}
checkpoint: {{every: 3}}
device: cpu
tracking: {{uri: none}}
"""


def test_a_run_on_two_datasets_from_training_to_export(tmp_path, small_dataset, colour_dataset, monkeypatch):
    file = tmp_path / "mixed.yaml"
    file.write_text(RECIPE.format(small=small_dataset, colour=colour_dataset))
    hashes = tuple(Dataset.open(folder).sha256 for folder in (small_dataset, colour_dataset))
    tracked = []

    class Tracker(of_run.Tracker):
        def __init__(self, run, uri, experiment, run_name, params, artifacts):
            tracked.append(params)
            super().__init__(run, uri, experiment, run_name, params, artifacts)

    monkeypatch.setattr(of_run, "Tracker", Tracker)

    def train(run, *overrides, resume="auto"):
        return loop.train(load_recipe(str(file), [f"run.dir={tmp_path / run}", *overrides]), resume)

    whole = train("whole")
    assert (tracked[0]["dataset_sha256.0"], tracked[0]["dataset_sha256.1"]) == hashes
    half = tmp_path / "whole" / "checkpoints" / "step-00000003"
    first, again = (read(at(one.checkpoint)) for one in (whole, train("again", resume=half)))
    assert at(whole.checkpoint).info.dataset_sha256 == hashes
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())

    swapped = f"data.path=[{colour_dataset},{small_dataset}]"
    with pytest.raises(UserError, match=rf"another order; go on with data.path=\[{small_dataset},{colour_dataset}\]"):
        train("whole", swapped)
    with pytest.raises(UserError, match=rf"another dataset: it has seen {hashes[0][:12]}, {hashes[1][:12]}"):
        train("whole", f"data.path={small_dataset}", "data.weights=[1]")
    with pytest.raises(UserError, match=r"data\.weights\.1 was 1\.0 and is 2\.0"):
        train("whole", "data.weights=[1, 2]", "data.mean=[0.4, 0.4, 0.4]", "data.std=[0.3, 0.3, 0.3]")

    facts = load_run(whole.run).dataset
    assert sum(facts["splits"].values()) == 66 + 30
    for dataset in (small_dataset, colour_dataset):
        (measured,) = evaluate_source(Knn(k=3), str(whole.run), dataset, device="cpu", resamples=0)
        assert measured.data.sha256 in hashes
    export_run(whole.run, tmp_path / "out", forms="timm")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| dataset SHA-256 | {hashes[0]}, {hashes[1]} |" in card
