"""A rank that stands still is named by the others, which end; a run that was suspended as a whole goes on."""

from __future__ import annotations

import signal
import time

import pytest
import torch

from medpretrain.health.watchdog import Watchdog
from medpretrain.training.process import Process

pytestmark = pytest.mark.distributed
HANG_S, GRACE_S = 2.0, 4.0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_also_where_it_holds_the_store(ranks, victim):
    ranks.start(hang_s=HANG_S)
    ranks.wait_for_steps(60)
    stopped = time.monotonic()
    ranks.signal(victim, signal.SIGSTOP)
    assert ranks.wait(1 - victim, timeout=20) == 77
    assert HANG_S / 2 < time.monotonic() - stopped < HANG_S + GRACE_S

    pid, said = ranks.processes[victim].pid, ranks.last_line(1 - victim)
    assert said.startswith("error on ")
    assert f", rank {1 - victim} of 2: no progress for 2 s: rank {victim} (" in said
    assert f"pid {pid}) is stopped by a signal, last at step " in said
    assert "; resume: cd " in said
    (event,) = ranks.rows(f"events{1 - victim}.jsonl")
    (culprit,) = event["culprits"]
    assert (event["event"], culprit["rank"], culprit["pid"]) == ("hang", victim, pid)
    assert culprit["stack"]
    assert any("all_reduce" in frame for frame in event["stacks"]["MainThread"])
    assert ranks.rows("failures.jsonl")[0]["code"] == 77


@pytest.mark.parametrize(
    ("fault", "named"), [("data", "is still at step 5, data"), ("loop", "is at step 5, step, in ")]
)
def test_a_rank_that_beats_but_does_not_come_is_told_from_those_that_wait_for_it(ranks, fault, named):
    ranks.start(hang_s=HANG_S, fail=fault, fail_rank=1)
    assert [ranks.wait(rank, timeout=40) for rank in (0, 1)] == [77, 77]
    lines = [ranks.last_line(rank) for rank in (0, 1)]
    said = [line for line in lines if line.startswith("error on ")]
    assert len(said) == 1, "one line a host"
    assert f"pid {ranks.processes[1].pid}) {named}" in said[0]
    assert f"pid {ranks.processes[0].pid}" not in said[0]


def test_a_run_suspended_as_a_whole_goes_on(ranks):
    ranks.start(hang_s=HANG_S, steps=150)
    ranks.wait_for_steps(20)
    for number, pause in ((signal.SIGSTOP, 1.5 * HANG_S), (signal.SIGCONT, 0)):
        for rank in (0, 1):
            ranks.signal(rank, number)
        time.sleep(pause)
    assert [ranks.wait(rank) for rank in (0, 1)] == [0, 0], ranks.errors(0)
    assert not ranks.rows("events0.jsonl")
    assert ranks.steps()[-1][0] == 150


def test_a_run_of_one_process_watches_itself(ranks):
    ranks.start(world=1, hang_s=1.0, fail="loop", fail_rank=0)
    assert ranks.wait(0, timeout=30) == 77
    assert ": no progress for 1 s at step 5, step, in " in ranks.last_line(0)


def test_mark_costs_less_than_a_thousandth_of_a_step_of_a_tenth_second():
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    with Watchdog(process, hang_s=600, slow=1.5, on_event=print) as watchdog:
        watchdog.mark(0, "step")
        started = time.process_time()
        for step in range(1000):
            watchdog.mark(step, "data")
            watchdog.mark(step, "step")
        assert (time.process_time() - started) / 1000 < 1e-4
