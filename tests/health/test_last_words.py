"""Whatever ends a run, its last line says why, where, and how to go on; secrets are in none of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.torchrun import END_AGENT
from medpretrain.health import last_words

SECRET = "tracking.uri=https://me:secret@mlflow.example"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(words, **environment) -> the command to resume."""

    def given(words, **environment):
        for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "orig_argv", words)
        monkeypatch.chdir(tmp_path)
        return last_words.resume_command()

    return given


def test_the_command_is_what_was_typed_without_secrets_and_without_resume_never(command, tmp_path):
    words = ["medpretrain", "train", "simclr", "run.dir=my run", SECRET]
    shown = f"cd {tmp_path} && medpretrain train simclr 'run.dir=my run' 'tracking.uri=https://***@mlflow.example'"
    assert command(words) == shown
    assert command([*words, "--resume", "never"]) == shown
    assert command([*words, "--resume=never"]) == shown
    assert command([*words, "--resume", "old/step-00000002"]) == f"{shown} --resume=old/step-00000002"


def test_a_checkpoint_to_resume_from_is_dropped_once_the_run_has_newer_ones(command, tmp_path, monkeypatch):
    monkeypatch.setattr(last_words, "_run", tmp_path)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert command(["medpretrain", "train", "simclr", "--resume", "old"]).endswith("train simclr")


def test_under_slurm_the_job_is_requeued(command):
    assert command(["x"], SLURM_JOB_ID="17").startswith("scontrol requeue 17")


def test_under_torchrun_the_agents_command_is_shown(command, monkeypatch):
    launched = [sys.executable, "-c", "import time; time.sleep(60)", "torchrun", "train", SECRET]
    agent = subprocess.Popen(launched)
    try:
        while not Path(f"/proc/{agent.pid}/cmdline").read_bytes():  # it is not quite there when Popen returns
            time.sleep(0.01)
        monkeypatch.setattr("os.getppid", lambda: agent.pid)
        shown = command(["worker"], TORCHELASTIC_RUN_ID="none")
        assert shlex.split(shown)[3:] == [
            *launched[:-1],
            "tracking.uri=https://***@mlflow.example",
        ]
        monkeypatch.setattr("os.getppid", lambda: 1)
        assert command(["worker"], TORCHELASTIC_RUN_ID="none").endswith("&& worker")
    finally:
        agent.kill()
        agent.wait()


@pytest.mark.distributed
def test_a_failing_rank_says_why_and_the_other_names_it_as_the_cause(ranks):
    ranks.start(hang_s=30, fail="bug", fail_rank=1, extra=(SECRET, "--resume=never"))
    assert [ranks.wait(rank) for rank in (0, 1)] == [1, 1]
    last, other = ranks.last_line(1), ranks.last_line(0)
    assert "Traceback" in ranks.errors(1)
    assert ", rank 1 of 2: KeyError: 'no such sample https://***@mlflow.example'; resume: cd " in last
    assert last.endswith(" 'tracking.uri=https://***@mlflow.example'")
    assert ", rank 0 of 2: another rank was lost (rank 1 on " in other
    assert "KeyError" in other
    assert "Traceback" not in ranks.errors(0)
    assert "secret" not in ranks.errors(0) + ranks.errors(1) + json.dumps(ranks.rows("failures.jsonl"))


@pytest.mark.distributed
def test_a_killed_rank_is_named_as_lost(ranks):
    ranks.start(hang_s=30)
    ranks.wait_for_steps(5)
    ranks.signal(1, signal.SIGKILL)
    assert ranks.wait(0) == 1
    assert ", rank 0 of 2: another rank was lost; it said nothing in the run folder" in ranks.last_line(0)


@pytest.mark.distributed
@pytest.mark.parametrize(("fault", "code", "words"), [("user", 2, "error"), ("work", 1, "rank ")])
def test_what_all_ranks_meet_is_said_once_a_host(ranks, fault, code, words):
    ranks.start(hang_s=30, fail=fault, fail_rank=99)
    assert [ranks.wait(rank) for rank in (0, 1)] == [code, code]
    (said,) = [line for rank in (0, 1) for line in ranks.errors(rank).splitlines() if line.startswith("error")]
    assert words in said
    assert "secret" not in said
    assert ("resume:" in said) == (fault == "work")


@pytest.mark.distributed
def test_what_one_rank_alone_meets_is_said_whichever_it_is(ranks):
    ranks.start(hang_s=30, fail="work", fail_rank=1)
    assert [ranks.wait(rank) for rank in (0, 1)] == [1, 1]
    assert ", rank 1 of 2: the loss is nan at step 5; resume: cd " in ranks.last_line(1)


@pytest.mark.distributed
def test_torchruns_summary_shows_the_cause_and_the_line_shows_torchruns_command(ranks):
    ranks.torchrun(flags=("--max-restarts=0",), hang_s=30, fail="oom", fail_rank=1)
    assert ranks.wait(0) == 1
    before, _, summary = ranks.errors(0).partition("Root Cause (first observed failure)")
    for text in (before, summary):
        assert ", rank 1 of 2: out of GPU memory (CUDA out of memory). More train.micro_batches" in text
    assert "-m torch.distributed.run --rdzv-backend=c10d" in summary
    assert "rank      : 1" in summary


@pytest.mark.parametrize(
    ("code", "torchrun", "told"), [(2, True, True), (76, True, True), (1, True, False), (2, False, False)]
)
def test_only_a_torchrun_is_ended_and_not_whoever_started_a_gate(monkeypatch, code, torchrun, told):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(os, "getppid", lambda: 4711)
    monkeypatch.setenv(END_AGENT, "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    last_words._spare_restarts(code)
    assert killed == ([4711] if told else [])
