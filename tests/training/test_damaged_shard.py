"""A shard that is damaged under a run of two processes: the run ends, and what it saw is a function of the data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import SHARDS, Dataset
from data_prep.images import prepare
from medpretrain.data.mixture import Mixture
from medpretrain.tracking.metrics_log import read_metrics

STEPS, BATCH, AHEAD = 26, 8, 12  # AHEAD: more steps than are ever prepared in advance
DEADLINE_S = 240
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


class Ranks:
    """`medpretrain train` as each rank of a gloo group on loopback, each in a process group of its own."""

    def __init__(self, recipe, *arguments, world):
        command = [sys.executable, "-m", "medpretrain.cli", "train", str(recipe), *map(str, arguments)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
                stderr=subprocess.PIPE,
            )
            for rank in range(world)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def signal(self, number):
        for process in self.processes:
            os.killpg(process.pid, number)

    def end(self):
        """What each of them wrote to stderr."""
        said = [process.communicate(timeout=DEADLINE_S)[1].decode() for process in self.processes]
        assert [process.returncode for process in self.processes] == [0] * len(said), said[0][-3000:]
        return said


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
def test_a_shard_damaged_in_mid_epoch_is_replaced_alike_by_two_ranks_and_by_one_that_resumes(dataset, tmp_path):
    clean = tmp_path / "clean"
    shutil.copytree(dataset, clean)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(dataset=dataset, steps=STEPS, batch=BATCH))
    two, one = tmp_path / "two", tmp_path / "one"

    with Ranks(recipe, f"run.dir={two}", world=2) as ranks:
        deadline = time.monotonic() + DEADLINE_S
        while not ((two / "metrics.jsonl").exists() and len(losses(two)) >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks.signal(signal.SIGSTOP)  # so that what is damaged is ahead of it, however fast it runs
        bad = damage_late_images(dataset, step=len(losses(two)))
        assert len(losses(two)) < STEPS - AHEAD
        ranks.signal(signal.SIGCONT)
        said = ranks.end()

    shutil.copytree(two, one, ignore=shutil.ignore_patterns("*-rank*.jsonl"))
    with Ranks(recipe, "--resume", two / "checkpoints" / "step-00000005", f"run.dir={one}", world=1) as ranks:
        ranks.end()

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
