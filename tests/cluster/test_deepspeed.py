"""`medpretrain launch deepspeed` through a hostfile, over ssh and pdsh, and without."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from launchers import deepspeed
from launchers.job import Job
from launchers.site import Site
from tests.cluster.sshd import start_sshd
from tests.faults.running import ROOT, committed, reached, rows, seen, steps

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


ODD = """it's "$HOME" 100%h, %n; {a,b} *"""


@pytest.fixture(scope="module", autouse=True)
def sshd(hosts, tmp_path_factory):
    start_sshd(hosts, tmp_path_factory.mktemp("keys") / "ssh")


@pytest.fixture
def launch(hosts, small_dataset, tmp_path):
    """launch(host, word, ...): a long run from there on `a` and `b` without a gate; all is ended with the test."""
    recipe, hostfile, site, run = (tmp_path / name for name in ("recipe.yaml", "hostfile", "site.yaml", "run"))
    recipe.write_text(RECIPE.format(dataset=small_dataset, steps=100_000).replace("every: 6", "every: 100000"))
    hostfile.write_text("a slots=1\nb slots=1\n")
    odd = ODD.replace("'", "''")
    site.write_text(f"""setup: ['printf %s "$ODD" > odd-$(hostname)']\nenvironment: {{ODD: '{odd}'}}\n""")
    started = []

    def start(host, *words):
        command = [sys.executable, "-m", "medpretrain", "launch", "deepspeed", recipe, f"run.dir={run}"]
        command += ["--hostfile", hostfile, "--site", site, "--no-preflight", *words]
        started.append(hosts[host].start(command, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    for pid in processes_of(run):
        os.kill(pid, signal.SIGKILL)


def processes_of(run):
    """All that have the run's folder among their words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def until(happens, process, timeout=240):
    deadline = time.monotonic() + timeout
    while not happens():
        assert time.monotonic() < deadline, process.said()[-3000:]
        time.sleep(0.05)


def under_way(run, process, step):
    until(lambda: reached(run, step)() or process.poll() is not None, process)
    assert process.poll() is None, process.said()[-3000:]


def test_words_and_variables_arrive_unchanged_on_all_hosts(hosts, monkeypatch, tmp_path):
    folder = tmp_path / ODD.replace("/", "")
    folder.mkdir()
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), os.environ['ODD'], sys.argv]))\n"
    )
    python.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "executable", str(python))
    job = Job("odd", "odd", (f"name={ODD}", "views.crop.crop=[0.5, 1]"), tmp_path / "run", 8)
    on = deepspeed.Hosts({"b": [0], "a": [1]})
    site = Site(environment={"ODD": ODD}, setup=("echo 100%h", 'export ODD="$ODD"'))
    for command, own in (
        (deepspeed.train(job, site, on), {"b": "--node_rank=0", "a": "--node_rank=1"}),
        (deepspeed.preflight(job, site, on), {"b": "b", "a": "a"}),
    ):
        answer = hosts["login"].run(command.words)
        assert answer.returncode == 0, answer.stderr
        for host in "ab":
            said = [line.removeprefix(f"{host}: ") for line in answer.stdout.splitlines() if line.startswith(host)]
            assert said[0] == "100%h"
            where, odd, words = json.loads(said[1])
            assert (where, odd, words[0]) == (str(folder), ODD, str(python))
            assert f"name={ODD}" in words
            assert "views.crop.crop=[0.5, 1]" in words
            assert own[host] in words


def test_ctrl_c_has_the_ranks_of_all_hosts_commit_and_leave(launch, tmp_path):
    run = tmp_path / "run"
    process = launch("login")
    under_way(run, process, 3)
    process.signal(signal.SIGINT)
    until(lambda: process.poll() is not None, process)
    assert process.returncode == 75, process.said()[-3000:]
    assert committed(run) == [steps(run)[-1]]
    assert processes_of(run) == []
    assert [(tmp_path / f"odd-{host}").read_text() for host in "ab"] == [ODD, ODD]


def test_ranks_commit_and_leave_when_the_launching_process_is_killed(launch, tmp_path):
    run = tmp_path / "run"
    process = launch("login")
    under_way(run, process, 3)
    process.signal(signal.SIGKILL)
    until(lambda: processes_of(run) == [], process)
    assert committed(run) == [steps(run)[-1]]


def test_when_a_rank_dies_all_hosts_end(launch, tmp_path):
    run = tmp_path / "run"
    process = launch("login")
    under_way(run, process, 3)
    ranks = [
        pid for pid in processes_of(run) if b"\0-u\0-m\0medpretrain\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(max(ranks), signal.SIGKILL)
    until(lambda: process.poll() is not None, process)
    assert process.returncode not in (0, 75), process.said()[-3000:]
    assert processes_of(run) == []


def test_sigterm_without_ssh_commits_and_leaves_no_rank_behind(launch, tmp_path):
    run = tmp_path / "run"
    process = launch("a", "--exclude", "b", "--no-ssh", "--node-rank", "0")
    under_way(run, process, 3)
    process.signal(signal.SIGTERM)
    until(lambda: process.poll() is not None, process)
    assert process.returncode == 75, process.said()[-3000:]
    assert committed(run) == [steps(run)[-1]]
    assert processes_of(run) == []
    assert (tmp_path / "odd-a").read_text() == ODD


def test_zero_2_on_two_hosts_over_pdsh_goes_on_alone_without_ssh(hosts, small_dataset, tmp_path):
    recipe, hostfile, run = tmp_path / "recipe.yaml", tmp_path / "hostfile", tmp_path / "run"
    recipe.write_text(RECIPE.format(dataset=small_dataset, steps=STEPS))
    hostfile.write_text("a slots=1\nb slots=1\n")
    launch = [sys.executable, "-m", "medpretrain", "launch", "deepspeed", recipe, f"run.dir={run}"]
    launch += ["--hostfile", hostfile]
    environment = {"PYTHONPATH": str(ROOT)}

    half = STEPS // 2
    answer = hosts["login"].run([*launch, f"train.steps={half}"], timeout=480, env=environment, cwd=tmp_path)
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
