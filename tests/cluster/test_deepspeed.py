"""`medpretrain launch deepspeed` through a hostfile, over ssh and pdsh, and without."""

from __future__ import annotations

import sys

import pytest

from tests.cluster.sshd import start_sshd
from tests.faults.running import ROOT, committed, rows, seen, steps

pytestmark = pytest.mark.cluster
STEPS = 24
RECIPE = """\
name: zero
data: {{path: {dataset}, channels: 1, labels: [modality, anatomy], trace: true, threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, count: 2, crop: [0.2, 1], flip: 0.5}}}}
method: {{name: modan_mulsupcon, projector: [16, 8]}}
optim: {{name: adamw, lr: 1.0e-3}}
train: {{steps: {steps}, global_batch: 8, zero_stage: 2, deterministic: true, threads: 1, log_every: 1}}
checkpoint: {{every: 6, keep: 99}}
device: cpu
tracking: {{uri: none}}
"""


def test_zero_2_on_two_hosts_over_pdsh_goes_on_alone_without_ssh(hosts, small_dataset, tmp_path):
    start_sshd(hosts, tmp_path / "ssh")
    recipe, hostfile, run = tmp_path / "recipe.yaml", tmp_path / "hostfile", tmp_path / "run"
    recipe.write_text(RECIPE.format(dataset=small_dataset, steps=STEPS))
    hostfile.write_text("a slots=1\nb slots=1\n")
    launch = [sys.executable, "-m", "medpretrain", "launch", "deepspeed", recipe, f"run.dir={run}"]
    launch += ["--hostfile", hostfile]
    environment = {"PYTHONPATH": str(ROOT)}

    half = STEPS // 2
    answer = hosts["login"].run([*launch, f"train.steps={half}"], timeout=240, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    assert "preflight of 2 hosts: " in answer.stdout, "the gate went over pdsh too"
    assert committed(run) == [6, 12]
    manifest = sorted(path.name for path in (run / "checkpoints" / "step-00000012").glob("rank-*"))
    assert len(manifest) == 2, "each host has written its part"

    alone = ["--exclude", "b", "--no-ssh", "--node-rank", "0", "--override", "train.steps", "--no-preflight"]
    answer = hosts["a"].run([*launch, *alone], timeout=240, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    assert [(row["step"], row["world"], row["host"]) for row in rows(run / "starts.jsonl")] == [
        (0, 2, "a"),
        (half, 1, "a"),
    ]
    assert steps(run) == list(range(1, STEPS + 1))

    words = ["train", recipe, f"run.dir={tmp_path / 'one'}", "strategy=ddp"]
    answer = hosts["a"].run([sys.executable, "-m", "medpretrain", *words], timeout=120, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert seen(run, half) == seen(tmp_path / "one", half), "the same samples and augmentations as one process"


def test_a_host_that_is_not_there_is_named_before_anything_runs(hosts, small_dataset, tmp_path):
    recipe, hostfile = tmp_path / "recipe.yaml", tmp_path / "hostfile"
    recipe.write_text(RECIPE.format(dataset=small_dataset, steps=STEPS))
    hostfile.write_text("a slots=1\nnowhere slots=1\n")
    launch = [sys.executable, "-m", "medpretrain", "launch", "deepspeed", recipe, "--hostfile", hostfile]
    answer = hosts["login"].run(launch, timeout=60, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert answer.returncode == 2
    assert "not to be reached by ssh: nowhere (" in answer.stderr
    assert "a (" not in answer.stderr
    assert not (tmp_path / "runs").exists()
