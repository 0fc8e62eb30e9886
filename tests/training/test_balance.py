"""A run with balanced classes sees what its order says, resumes exactly, and tells its method what it sees."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from medpretrain.checkpoints import at, read
from medpretrain.data.balance import balanced_order
from medpretrain.data.mixture import Mixture
from medpretrain.recipe_file import load_recipe
from medpretrain.training import loop
from medpretrain.training.build import load_run, training_set

RECIPE = """\
name: balanced
data:
  path: [{small}, {colour}]
  balance: {{label: class, how: over}}
  labels: [class, modality]
  threads: 1
  trace: true
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, crop: [0.3, 1]}}}}
method: {{name: supervised, weighting: inverse}}
optim: {{name: sgd, lr: 0.01}}
train: {{epochs: 1, global_batch: 8, log_every: 1, threads: 1}}
checkpoint: {{every: 3}}
device: cpu
tracking: {{uri: none}}
"""


@pytest.fixture
def recipe(tmp_path, small_dataset, colour_dataset):
    file = tmp_path / "balanced.yaml"
    file.write_text(RECIPE.format(small=small_dataset, colour=colour_dataset))
    return lambda *overrides: load_recipe(str(file), overrides)


@pytest.fixture(scope="module")
def mixture(small_dataset, colour_dataset):
    return Mixture.open([small_dataset, colour_dataset])


@pytest.mark.parametrize("how", ["over", "under"])
def test_a_balanced_run_sees_equal_classes_and_resumes_exactly(how, recipe, mixture, tmp_path, caplog):
    caplog.set_level("INFO")

    def train(run, resume="auto"):
        return loop.train(recipe(f"data.balance.how={how}", f"run.dir={tmp_path / run}"), resume)

    whole = train("whole")
    assert caplog.text.count("are left out") == 1
    rows, ids = mixture.rows("train"), mixture.labels("class")
    counts = np.bincount(ids[rows])
    assert counts.min() < counts.max()
    images = len(rows) if how == "over" else counts.min() * len(counts)
    assert whole.step == math.ceil(images / 8) > 3
    seen = [
        json.loads(line)["sample"] for line in (tmp_path / "whole" / "samples-rank0.jsonl").read_text().splitlines()
    ]
    assert len(seen) >= whole.step
    for sample in seen:
        assert np.bincount(ids[sample], minlength=len(counts)).tolist() == [2] * len(counts)

    half = tmp_path / "whole" / "checkpoints" / "step-00000003"
    first, again = (read(at(one.checkpoint)) for one in (whole, train("again", half)))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    resumed = (tmp_path / "again" / "samples-rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in resumed][: whole.step - 3] == seen[3 : whole.step]
    assert load_run(whole.run).dataset["training"]["counts"]["class"] == [round(images / 4)] * 4


def test_another_balance_is_another_run(recipe, tmp_path):
    loop.train(recipe(f"run.dir={tmp_path / 'run'}", "train.steps=1"))
    with pytest.raises(UserError, match=r"data\.balance\.how was 'over' and is 'under'"):
        loop.train(recipe(f"run.dir={tmp_path / 'run'}", "train.steps=1", "data.balance.how=under"))


def test_counts_of_every_label_are_those_of_the_images_as_seen(recipe, mixture):
    """Or weights by counts would balance what is balanced already."""
    rows, ids, modality = mixture.rows("train"), mixture.labels("class"), mixture.labels("modality")
    plain = training_set(recipe(), mixture)
    assert plain.counts["class"] == tuple(np.bincount(ids[rows]))
    assert plain.samples == len(rows)
    for how in ("over", "under"):
        order = balanced_order(mixture, "class", how, split="train", seed=0, global_batch=8)
        found = training_set(recipe(), mixture, order)
        assert found.samples == len(rows)
        assert found.counts["class"] == (round(order.epoch_size / 4),) * 4
        epochs = 400
        seen = modality[rows[order.places(0, epochs * order.epoch_size).sample]]
        expected = np.bincount(seen[seen >= 0], minlength=len(plain.counts["modality"])) / epochs
        assert found.counts["modality"] == pytest.approx(expected, abs=0.6)
        assert (np.array(found.counts["modality"]) > 0).tolist() == (expected > 0).tolist()


def test_mean_and_std_stay_those_of_the_split(recipe, mixture):
    settled = loop.with_normalisation(recipe(), mixture)
    assert (settled.data.mean, settled.data.std) == mixture.normalisation("train", 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.weights=[1, 1]", "balance and weights both say"),
        ("data.block_shards=2", "block_shards from few"),
        ("data.balance={label: class}", "the key data.balance.how is missing"),
        ("data.balance.how=both", r"data.balance.how: .*'over' or 'under'"),
        ("data.balance.hwo=over", "unknown key 'hwo'; did you mean 'how'"),
    ],
)
def test_a_balance_that_says_too_much_or_too_little_is_refused(override, message, recipe):
    with pytest.raises(UserError, match=message):
        recipe(override)


def test_the_label_of_the_balance_need_not_be_learnt(recipe, tmp_path):
    finished = loop.train(
        recipe(f"run.dir={tmp_path / 'run'}", "train.steps=2", "data.labels=[modality]", "method.loss=binary")
    )
    assert load_run(finished.run).dataset["training"]["classes"].keys() == {"modality"}
