"""A shard that is damaged under a run of two processes: the run ends, and what it saw is a function of the data."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import SHARDS, Dataset
from data_prep.images import prepare
from medpretrain.data.mixture import Mixture
from medpretrain.tracking.metrics_log import read_metrics
from tests.faults.running import Runs, reached

STEPS, BATCH, AHEAD = 26, 8, 12  # AHEAD: more steps than are ever prepared in advance
RECIPE = """\
name: damaged
data: {{path: {dataset}, channels: 1, labels: [class], trace: true, threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 16, count: 2, crop: [0.4, 1], jitter: {{contrast: 0.4}}, noise: {{}}}}}}
method: {{name: supcon, projector: [8]}}
optim: {{name: sgd, lr: 1.0e-6}}
train: {{steps: {steps}, global_batch: {batch}, deterministic: true, threads: 1, log_every: 1}}
checkpoint: {{every: 5, keep: 9}}
device: cpu
tracking: {{uri: none}}
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """As many images as STEPS see once, so that many are still to come when a shard is damaged."""
    folder = tmp_path_factory.mktemp("many")
    draw = np.random.default_rng(4)
    for level, name in ((40, "a"), (120, "b")):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(110):
            pixels = (draw.integers(0, 60, (24, 24)) + level).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"p{image}_{name}.png")
    prepare(folder / "images", folder / "shards", split={"train": 1.0}, shard_size=110)
    return folder / "shards"


@pytest.fixture
def runs(dataset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(dataset=dataset, steps=STEPS, batch=BATCH))
    started = Runs(recipe, tmp_path)
    yield started
    started.close()


def lines(run, name):
    return [json.loads(line) for path in sorted(run.glob(name)) for line in path.read_text().splitlines()]


def seen(run):
    """(step, epoch, row, digest of the augmentation) of all samples, in order."""
    found = [
        (line["step"], *one)
        for line in lines(run, "samples-rank*.jsonl")
        for one in zip(line["epoch"], line["sample"], line["parameters"], strict=True)
    ]
    return sorted(one for one in found if one[0] < STEPS)


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def damage_late_images(folder, step):
    """Overwrite all images of the first shard that no rank can have asked for by `step`; their rows."""
    dataset = Dataset.open(folder)
    rows = dataset.rows("train")
    order = Mixture.open([folder]).order("train", seed=0, global_batch=BATCH)
    early = set(rows[order.places(0, (step + AHEAD) * BATCH).sample].tolist())
    bad = [row for row in rows[dataset.shard_ids[rows] == 0].tolist() if row not in early]
    with (folder / SHARDS / dataset.info.shards[0].name).open("r+b") as shard:
        for row in bad:
            shard.seek(dataset.index.column("offset")[row].as_py())
            shard.write(np.random.default_rng(row).bytes(dataset.index.column("length")[row].as_py()))
    return bad


@pytest.mark.distributed
def test_a_shard_damaged_in_mid_epoch_is_replaced_alike_by_two_ranks_and_by_one_that_resumes(dataset, runs, tmp_path):
    clean = tmp_path / "clean"
    shutil.copytree(dataset, clean)
    two, one = tmp_path / "two", tmp_path / "one"

    ranks = runs.ranks(f"run.dir={two}")
    runs.wait(reached(two, 2), ranks)
    for rank in ranks:  # so that what is damaged is ahead of it, however fast it runs
        rank.send_signal(signal.SIGSTOP)
    bad = damage_late_images(dataset, step=len(losses(two)))
    assert len(losses(two)) < STEPS - AHEAD
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    runs.end_well(ranks)
    said = [runs.said(rank) for rank in ranks]

    shutil.copytree(two, one, ignore=shutil.ignore_patterns("*-rank*.jsonl"))
    checkpoint = two / "checkpoints" / "step-00000005"
    runs.end_well(runs.ranks("--resume", checkpoint, f"run.dir={one}", world=1))

    assert len(seen(two)) == STEPS * BATCH
    assert seen(one) == [place for place in seen(two) if place[0] >= 5]
    assert losses(one) == pytest.approx(losses(two), rel=1e-3)  # labels or images that differ would be seen
    assert not {row for _, _, row, _ in seen(two)} & set(bad)

    listed = lines(two, "replaced-rank*.jsonl")
    assert {line["row"] for line in listed} <= set(bad)
    replaced = {
        here
        for line in lines(two, "samples-rank*.jsonl")
        for here, there in zip(line.get("in_place_of", []), line["sample"], strict=False)
        if here != there and line["step"] < STEPS
    }
    assert replaced
    assert replaced <= {line["row"] for line in listed}
    labels = Dataset.open(clean).labels("class")
    for line in listed:
        assert labels[line["row"]] == labels[line["replacement"]]
        assert line["shard"] == "train-00000.tar"
        assert any(f"image {line['key']} of" in text for text in said)
