"""A run that was killed ends as if it had not been, and no sample is lost or seen twice."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from data_prep.dataset import Dataset
from medpretrain.checkpoints import newest, open_target, read
from medpretrain.tracking.metrics_log import read_metrics

STEPS, BATCH = 14, 8
VIEWS = {
    "dino": "{global: {size: 32, count: 2, crop: [0.4, 1]}, local: {size: 16, count: 2, crop: [0.1, 0.4], flip: 0.5}}",
    "modan_mulsupcon": "{crop: {size: 32, count: 2, crop: [0.2, 1], jitter: {contrast: 0.4}, blur: {}, noise: {}}}",
    "amimv": "{normalised: {size: 32}, augmented: {size: 32, crop: [0.2, 1], flip: 0.5, bias_field: {}}}",
}
OPTIONS = {
    "dino": "prototypes: 32, hidden: 16, bottleneck: 8, freeze_last_layer_epochs: 0.5",
    "modan_mulsupcon": "projector: [16, 8]",
    "amimv": "momentum: 0.9, projector: [16, 8]",
}


def recipe(folder, method, dataset, weights=""):
    path = folder / f"{method}.yaml"
    path.write_text(f"""\
name: {method}
data: {{path: {dataset}, {weights} channels: 1, labels: [modality, anatomy], trace: true, threads: 1}}
backbone: {{name: {"vit_tiny_patch16_224" if method == "dino" else "test_resnet"}, drop_path: 0.2}}
views: {VIEWS[method]}
method: {{name: {method}, {OPTIONS[method]}}}
optim: {{name: adamw, lr: 1.0e-3, weight_decay: 0.04, warmup: 0.2, clip: 3.0}}
train:
  {{steps: {STEPS}, global_batch: {BATCH}, deterministic: true, threads: 1, log_every: 1}}
checkpoint: {{every: 3, keep: 9}}
tracking: {{uri: none}}
""")
    return path


def start(recipe_file, run, world=1):
    command = [sys.executable, "-m", "medpretrain.cli", "train", str(recipe_file), f"run.dir={run}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
        environment = os.environ | address | {name: str(value) for name, value in place.items()}
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE))
    return ranks


def end(ranks, timeout=240):
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=timeout)
            assert rank.returncode == 0, errors.decode()[-3000:]
    finally:
        kill(ranks)


def kill(ranks):
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
        rank.communicate()


def kill_after(ranks, run, step):
    deadline = time.monotonic() + 240
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))):
        assert all(rank.poll() is None for rank in ranks), "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(ranks)


def seen(run):
    """(step, epoch, sample) -> digest of the augmentation, the last time each was delivered."""
    found = {}
    for path in run.glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            for epoch, sample, digest in zip(row["epoch"], row["sample"], row["parameters"], strict=True):
                found[row["step"], epoch, sample] = digest
    return {place: digest for place, digest in found.items() if place[0] < STEPS}


def state(run):
    found = newest(open_target(None, run))
    assert found.step == STEPS
    return read(found)


def assert_identical(a, b, at=""):
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_identical(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{at}.{number}")
    else:
        assert a == b, at


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["dino", "modan_mulsupcon", "amimv"])
def test_a_killed_and_resumed_run_is_bit_identical_to_an_undisturbed_one(method, tmp_path, small_dataset):
    seed = random.randrange(10**6)
    at = random.Random(seed).randrange(1, STEPS)
    print(f"seed {seed}: killed after step {at}")
    chosen = recipe(tmp_path, method, small_dataset)
    end(start(chosen, tmp_path / "whole"))
    kill_after(start(chosen, tmp_path / "killed"), tmp_path / "killed", at)
    end(start(chosen, tmp_path / "killed"))

    assert_identical(state(tmp_path / "killed"), state(tmp_path / "whole"))
    assert seen(tmp_path / "killed") == seen(tmp_path / "whole")
    whole, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [row["step"] for row in killed] == list(range(1, STEPS + 1))
    for column in ("loss", "lr", "grad_norm", "feature_std", "rankme", "alignment", "uniformity"):
        assert [row[column] for row in killed] == [row[column] for row in whole]


@pytest.mark.distributed
def test_after_two_ranks_one_goes_on_with_the_same_samples_and_augmentations(tmp_path, small_dataset, colour_dataset):
    seed = random.randrange(10**6)
    at = random.Random(seed).randrange(3, STEPS - 2)
    print(f"seed {seed}: killed after step {at}")
    chosen = recipe(tmp_path, "modan_mulsupcon", f"[{small_dataset}, {colour_dataset}]", "weights: [3, 1],")
    end(start(chosen, tmp_path / "whole", world=2))
    kill_after(start(chosen, tmp_path / "changed", world=2), tmp_path / "changed", at)
    end(start(chosen, tmp_path / "changed", world=1))

    whole, changed = seen(tmp_path / "whole"), seen(tmp_path / "changed")
    assert changed == whole
    assert len(changed) == STEPS * BATCH
    second = len(Dataset.open(small_dataset))  # the first row of the second dataset
    parts = [[place for place in changed if (place[2] >= second) == other] for other in (False, True)]
    assert [len(part) for part in parts] == [STEPS * BATCH * 3 / 4, STEPS * BATCH / 4]
    for part in parts:
        samples = [sample for _, epoch, sample in part if epoch == 0]
        assert len(samples) == len(set(samples)), "a sample was seen twice in an epoch"
        last = max(epoch for _, epoch, _ in part)
        assert last >= 1
        rows = {sample for _, epoch, sample in part if epoch < last}
        assert all({sample for _, epoch, sample in part if epoch == one} == rows for one in range(last))
