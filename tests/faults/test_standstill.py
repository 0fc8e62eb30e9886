"""A rank that stands still in a real run: the others end within faults.hang_s and name it."""

from __future__ import annotations

import signal
import socket
import time

import pytest

from tests.faults.running import committed, events, reached

pytestmark = pytest.mark.distributed
HANG_S, GRACE_S = 4, 8


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ended_in_time(victim, runs, tmp_path):
    run = tmp_path / "run"
    faults = [{"fault": "sleep", "seconds": 0.02}]
    ranks = runs.ranks(f"run.dir={run}", "train.steps=3000", f"faults.hang_s={HANG_S}", faults=faults)
    runs.wait(reached(run, 8), ranks)
    stopped = time.monotonic()
    ranks[victim].send_signal(signal.SIGSTOP)
    other = ranks[1 - victim]
    assert runs.end([other], timeout=60) == [77]
    assert HANG_S / 2 < time.monotonic() - stopped < HANG_S + GRACE_S

    said, host = runs.last_line(other), socket.gethostname()
    assert said.startswith(f"error on {host}, rank {1 - victim} of 2: no progress for ")
    assert f"rank {victim} ({host}, pid {ranks[victim].pid}) is stopped by a signal, last at step " in said
    assert "; resume: cd " in said
    (event,) = events(run, "hang")
    (culprit,) = event["culprits"]
    assert (event["rank"], culprit["rank"], culprit["pid"]) == (1 - victim, victim, ranks[victim].pid)
    assert culprit["stack"]
    assert event["stacks"]["MainThread"]
    assert committed(run)
