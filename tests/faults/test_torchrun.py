"""Signals, killed workers and runs that never get on, under torchrun and without: what is done is never done again."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from launchers.torchrun import END_AGENT
from tests.faults.running import (
    DEADLINE_S,
    Runs,
    assert_identical,
    committed,
    events,
    reached,
    read_metrics,
    rows,
    seen,
    steps,
    workers_of,
    write_recipe,
)

pytestmark = pytest.mark.distributed
STEPS = 60
TWO = ("--standalone", "--nproc-per-node=2")
PACE = {"fault": "sleep", "seconds": 0.05}  # so that a signal comes before the end


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_dataset):
    """An undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("whole")
    runs = Runs(write_recipe(folder, small_dataset, STEPS), folder)
    try:
        runs.end_well(runs.ranks(f"run.dir={folder / 'run'}"))
    finally:
        runs.close()
    return folder / "run"


def assert_same(run, whole):
    assert_identical(run, whole)
    assert seen(run, STEPS) == seen(whole, STEPS)
    got, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (run, whole))
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for key in ("loss", "lr", "grad_norm", "rankme"):
        assert [row[key] for row in got] == [row[key] for row in wanted]


def assert_gone(pids, within_s):
    deadline = time.monotonic() + within_s
    left = pids
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}/stat").exists()]
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "workers go on"


def test_a_run_signalled_again_and_again_commits_each_time_and_ends_like_an_undisturbed_one(whole, runs, tmp_path):
    run = tmp_path / "run"
    arguments = (f"run.dir={run}", f"train.steps={STEPS}")
    left_at = []

    def left(number, said):
        step = committed(run)[-1]
        assert steps(run)[-1] == step, "nothing is lost and nothing is ahead of the checkpoint"
        assert [(row["step"], row["signal"]) for row in events(run, "preempted")][-1] == (step, number.name)
        assert f"{number.name} at step {step} of {STEPS}; the checkpoint is committed: " in said
        assert "; resume: cd " in said
        left_at.append(step)

    for number, flags in (
        (signal.SIGTERM, ()),
        (signal.SIGUSR1, ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",)),
    ):
        agent = runs.torchrun(*arguments, flags=(*TWO, *flags), faults=[PACE])
        runs.wait(reached(run, (left_at or [0])[-1] + 7), [agent])
        workers = workers_of(agent)
        assert len(workers) == 2
        agent.send_signal(number)
        assert_gone(workers, within_s=15)
        assert runs.end([agent], timeout=30) == [1]
        left(number, runs.said(agent))

    ranks = runs.ranks(*arguments, faults=[PACE])
    runs.wait(reached(run, left_at[-1] + 7), ranks)
    ranks[1].send_signal(signal.SIGUSR1)  # one alone
    assert runs.end(ranks, timeout=30) == [75, 75]
    left(signal.SIGUSR1, runs.said(ranks[0]) + runs.said(ranks[1]))

    runs.end_well(runs.ranks(*arguments))
    assert_same(run, whole)
    assert [row["step"] for row in rows(run / "starts.jsonl")] == [0, *left_at]


def test_a_killed_worker_comes_back_by_itself_and_goes_on_from_the_last_commit(whole, runs, tmp_path):
    """Also where the launch was asked to begin anew: a restart has the same words."""
    run = tmp_path / "run"
    arguments = (f"run.dir={run}", f"train.steps={STEPS}", "--resume", "never")
    agent = runs.torchrun(*arguments, flags=(*TWO, "--max-restarts=3"), faults=[PACE])
    runs.wait(lambda: bool(committed(run)) and steps(run)[-1] >= 8, [agent])
    os.kill(workers_of(agent)[1], signal.SIGKILL)
    runs.end_well([agent])
    assert_same(run, whole)
    first, second = rows(run / "starts.jsonl")
    assert (first["restart"], second["restart"], second["world"]) == (0, 1, 2)
    assert second["step"] >= 5, "from a committed step"


def test_what_would_fail_again_spares_a_launched_torchrun_its_restarts(runs, tmp_path, monkeypatch):
    monkeypatch.setenv(END_AGENT, "1")
    flags = (*TWO, "--max-restarts=50")
    agent = runs.torchrun(f"run.dir={tmp_path / 'run'}", "data.path=nowhere", flags=flags)
    assert runs.end([agent], timeout=DEADLINE_S) == [1]
    assert runs.said(agent).count("nowhere is no prepared dataset") == 1, "said once, and not started again"


def test_restarts_that_get_no_further_end_with_what_stopped_them(runs, tmp_path):
    run = tmp_path / "run"
    flags = ("--standalone", "--nproc-per-node=1", "--max-restarts=4")
    agent = runs.torchrun(f"run.dir={run}", flags=flags, faults=[{"fault": "raise", "steps": [2]}])
    assert runs.end([agent], timeout=2 * DEADLINE_S) == [1]  # it starts five times
    cause = (
        "3 restarts one after another went on from step 0 and none got to the next checkpoint; they ended with "
        f"rank 0 on {socket.gethostname()}: RuntimeError: injected (3 x). A start by hand goes on from step 0"
    )
    summary = runs.said(agent).partition("Root Cause (first observed failure)")[2]
    assert cause in summary
    assert [(row["step"], row["restart"]) for row in rows(run / "starts.jsonl")] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [row["code"] for row in rows(run / "failures.jsonl")] == [1, 1, 1, 1, 76]
