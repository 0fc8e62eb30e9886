"""A survey shows a method every training image once, as it is, and leaves no trace in the method."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_prep.dataset import Dataset
from data_prep.images import prepare
from medpretrain.checkpoints import at, newest, open_target, read
from medpretrain.data.batches import plain_batches
from medpretrain.data.mixture import Mixture
from medpretrain.losses.contrastive import unit
from medpretrain.methods.base import Progress
from medpretrain.recipe_file import load_recipe
from medpretrain.training import loop
from medpretrain.training.build import build_method, load_run, training_set
from medpretrain.training.process import Process
from medpretrain.training.survey import Surveyor

CPU = torch.device("cpu")
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=CPU)
START = Progress(step=0, total=4, epoch=0.0)
RECIPE = """\
name: surveyed
data: {{path: {dataset}, channels: 1, labels: [class], threads: 1, trace: true}}
backbone: {{name: {backbone}, drop_path: {drop_path}}}
views: {{crop: {{size: 32, count: 2, crop: [0.3, 1], flip: 0.5, jitter: {{contrast: 0.4}}, noise: {{}}}}}}
method: {{name: {method}, projector: [{projector}]}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 4, global_batch: 8, log_every: 1, threads: 1, deterministic: true}}
checkpoint: {{every: 2}}
device: cpu
tracking: {{uri: none}}
"""


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Shards of 26 small gray images of two unequal classes in several shards."""
    folder = tmp_path_factory.mktemp("two")
    draw = np.random.default_rng(2)
    for name, count, level in (("benign", 18, 60), ("malignant", 8, 140)):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(count):
            pixels = draw.integers(0, 50, (40, 34 + image)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"p{image}_{name}.png")
    prepare(folder / "images", folder / "shards", split={"train": 0.8, "test": 0.2}, shard_size=6)
    return folder / "shards"


@pytest.fixture
def recipe(tmp_path):
    """Writes and reads a tiny recipe; a ViT has no BatchNorm, and one linear layer behind it has none either."""

    def made(dataset, *overrides, method="supcon", backbone="test_vit", drop_path=0.0, projector="4"):
        file = tmp_path / "surveyed.yaml"
        file.write_text(
            RECIPE.format(dataset=dataset, method=method, backbone=backbone, drop_path=drop_path, projector=projector)
        )
        return load_recipe(str(file), [f"run.dir={tmp_path / 'run'}", *overrides])

    return made


class Listening:
    """Keeps what a survey tells a method that wants one at step 0."""

    def __init__(self, recipe):
        self.dataset = Mixture.open(recipe.data.path, recipe.data.weights)
        self.recipe = loop.with_normalisation(recipe, self.dataset)
        self.method = build_method(self.recipe, training_set(self.recipe, self.dataset)).train()
        self.method.wants_survey = lambda progress: progress.step == 0
        self.method.survey = lambda embeddings, labels: self.heard.append((embeddings, labels))
        self.heard = []

    def survey(self, progress=START):
        """(embeddings, labels), or None if the method was not told."""
        self.heard.clear()
        surveyor = Surveyor(lambda: loop.survey_stream(self.recipe, self.dataset, ALONE), self.recipe.train.precision)
        surveyor.before_step(self.method, progress)
        return self.heard[0] if self.heard else None

    def alone(self):
        """The embedding of each training image, by itself, in the order of rows."""
        data, rows = self.recipe.data, self.dataset.rows("train")
        images = plain_batches(
            self.dataset, rows, size=32, channels=1, mean=data.mean, std=data.std, batch=1, device=CPU
        )
        with torch.no_grad():
            return torch.cat([self.method.eval().embed(image) for image in images])


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_every_training_image_is_embedded_once_in_the_order_of_its_number(small_dataset, recipe, drop_path):
    one = Listening(recipe(small_dataset, drop_path=drop_path))
    embeddings, labels = one.survey()
    dataset = Dataset.open(small_dataset)
    assert len(embeddings) == len(dataset.rows("train"))
    assert len(embeddings) % one.recipe.train.global_batch  # the last batch reaches beyond the end
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, one.alone(), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels["class"], torch.from_numpy(dataset.labels("class")[dataset.rows("train")]))
    assert torch.unique(embeddings, dim=0).shape == embeddings.shape  # no two alike: the order is told apart


@pytest.mark.parametrize(("global_batch", "micro_batches"), [(8, 4), (15, 1), (49, 7), (2, 1)])
def test_embeddings_do_not_depend_on_the_batch(small_dataset, recipe, global_batch, micro_batches):
    sizes = f"train.global_batch={global_batch}", f"train.micro_batches={micro_batches}"
    expected, _ = Listening(recipe(small_dataset)).survey()
    found, _ = Listening(recipe(small_dataset, *sizes)).survey()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_bf16_embeddings_arrive_in_float32_and_near(small_dataset, recipe):
    expected, _ = Listening(recipe(small_dataset)).survey()
    found, _ = Listening(recipe(small_dataset, "train.precision=bf16")).survey()
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert ((found - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all()


def test_images_of_several_datasets_are_seen_once_each_whatever_their_weights(small_dataset, colour_dataset, recipe):
    paths = f"data.path=[{small_dataset},{colour_dataset}]"
    one = Listening(recipe(small_dataset, paths, "data.weights=[1, 3]"))
    embeddings, labels = one.survey()
    assert len(embeddings) == sum(len(Dataset.open(folder).rows("train")) for folder in (small_dataset, colour_dataset))
    torch.testing.assert_close(embeddings, one.alone(), rtol=1e-4, atol=1e-5)
    names = one.dataset.label_names("class")
    assert names[labels["class"][-1]] in ("hand", "foot")


def test_a_survey_leaves_no_trace_in_the_method(small_dataset, recipe):
    one = Listening(recipe(small_dataset, backbone="test_resnet", drop_path=0.2, projector="16, 4"))
    frozen = next(layer for layer in one.method.modules() if isinstance(layer, nn.BatchNorm2d))
    frozen.eval()  # a layer may have a mode of its own
    before = {name: value.clone() for name, value in one.method.state_dict().items()}
    modes = [layer.training for layer in one.method.modules()]
    torch.manual_seed(9)
    expected_draw = torch.rand(3)
    torch.manual_seed(9)
    embeddings, _ = one.survey()
    assert torch.equal(torch.rand(3), expected_draw)
    assert [layer.training for layer in one.method.modules()] == modes
    assert all(layer.track_running_stats for layer in one.method.modules() if isinstance(layer, nn.BatchNorm2d))
    after = one.method.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in one.method.parameters())
    again, _ = one.survey()
    assert torch.equal(again, embeddings)


def test_the_method_is_as_before_when_embedding_fails(small_dataset, recipe):
    one = Listening(recipe(small_dataset, backbone="test_resnet"))
    modes = [layer.training for layer in one.method.modules()]

    def fails(images):
        raise RuntimeError("no memory")

    one.method.embed = fails
    with pytest.raises(RuntimeError, match="no memory"):
        one.survey()
    assert [layer.training for layer in one.method.modules()] == modes
    assert all(layer.track_running_stats for layer in one.method.modules() if isinstance(layer, nn.BatchNorm2d))


def test_batchnorm_takes_the_statistics_of_the_images_and_not_its_untrained_ones(small_dataset, recipe):
    """At the first step the running mean is 0 and the variance 1: nothing like that of images."""
    one = Listening(recipe(small_dataset, backbone="test_resnet"))
    expected, _ = one.survey()
    for layer in one.method.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean += 3
    found, _ = one.survey()
    assert torch.equal(found, expected)


def test_no_image_is_read_where_no_survey_is_wanted(small_dataset, recipe):
    one = Listening(recipe(small_dataset))
    one.method.embed = None
    assert one.survey(Progress(step=1, total=4, epoch=0.1)) is None


def test_a_run_places_its_prototypes_once_and_resumes_with_them(two_classes, recipe, tmp_path, monkeypatch):
    surveys = []

    class Counting(Surveyor):
        def before_step(self, method, progress):
            before = method.prototypes.clone()
            super().before_step(method, progress)
            surveys.append((progress.step, not torch.equal(before, method.prototypes)))

    monkeypatch.setattr(loop, "Surveyor", Counting)

    def train(run, resume="auto"):
        chosen = recipe(two_classes, f"run.dir={tmp_path / run}", method="supervised_prototypes", projector="16, 4")
        return loop.train(chosen, resume)

    whole = train("whole")
    assert surveys == [(0, True), (1, False), (2, False), (3, False)]
    surveys.clear()
    again = train("again", resume=tmp_path / "whole" / "checkpoints" / "step-00000002")
    assert surveys == [(2, False), (3, False)]

    first, second = (read(at(one.checkpoint), "method.") for one in (whole, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    lines = (whole.run / "samples-rank0.jsonl").read_text().splitlines()
    traced = [json.loads(line)["step"] for line in lines]
    assert traced == sorted(set(traced))  # the survey's own images are not among those trained on
    majority, minority = first["prototypes"]
    assert majority.norm().item() == pytest.approx(1)
    assert torch.equal(majority, -minority)
    kept = at(whole.checkpoint).info.extra["dataset"]
    assert load_run(whole.run).dataset == kept
    seen = training_set(recipe(two_classes, method="supervised_prototypes"), Mixture.open([two_classes]))
    assert kept["training"]["counts"]["class"] == list(seen.counts["class"])


def test_a_run_places_the_prototype_of_the_majority_among_the_images_it_starts_from(two_classes, recipe):
    """What reaches the buffer is the median of the untrained network's embeddings, of both classes together."""
    chosen = recipe(two_classes, "train.steps=1", "optim.lr=1e-12", method="supervised_prototypes")
    finished = loop.train(chosen)
    state = read(at(finished.checkpoint), "method.")
    one = Listening(chosen)
    one.method.load_state_dict(state)
    directions = unit(one.alone())
    counts = training_set(one.recipe, one.dataset).counts["class"]
    majority = state["prototypes"][int(np.argmax(counts))]
    assert counts[0] > counts[1] > 0
    reached = (directions - majority).norm(dim=1).mean()
    torch.manual_seed(0)
    for turn in range(200):
        near = unit(majority + 10 ** -(turn % 4) * torch.randn_like(majority))
        assert (directions - near).norm(dim=1).mean() >= reached - 1e-5
    assert math.isclose(majority.norm(), 1, rel_tol=1e-5)


@pytest.mark.distributed
def test_two_ranks_place_the_prototypes_of_one(two_classes, recipe, tmp_path, run_ranks):
    """Each embeds its own images of every global batch, and both see all embeddings in the same order."""
    chosen = recipe(two_classes, "train.steps=1", method="supervised_prototypes")
    expected = read(at(loop.train(chosen).checkpoint), "method.")["prototypes"]
    command = ["-m", "medpretrain.cli", "train", str(tmp_path / "surveyed.yaml"), "train.steps=1"]
    run_ranks([*command, f"run.dir={tmp_path / 'two'}"], 2)
    found = read(newest(open_target(None, tmp_path / "two")), "method.")["prototypes"]
    assert found.any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
