"""A signal to one rank takes all ranks out at the same step, with a checkpoint of it; also by way of torchrun."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from medpretrain.health.preemption import SIGNALS, Preemption

pytestmark = pytest.mark.distributed


def left_together(ranks):
    first, second = ranks.steps(0)[-1][0], ranks.steps(1)[-1][0]
    assert first == second
    assert f'"step": {first}' in (ranks.run / "checkpoint.json").read_text()
    return first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_ranks_signalled_at_different_moments_leave_at_the_same_step(ranks, number):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")
    ranks.start(hang_s=30)
    ranks.wait_for_steps(10)
    order = draw.sample([0, 1], k=2)
    ranks.signal(order[0], number)
    if number != signal.SIGINT:  # a second one would end it at once
        time.sleep(draw.uniform(0, 0.1))
        ranks.signal(order[1], number)
    assert [ranks.wait(rank) for rank in (0, 1)] == [75, 75], ranks.errors(0)
    step = left_together(ranks)
    said = [ranks.last_line(rank) for rank in (0, 1) if "error on " in ranks.errors(rank)]
    assert len(said) == 1
    assert f"{number.name}: step {step} is committed; resume: cd " in said[0]


def test_one_process_asks_nobody_and_a_second_interrupt_ends_at_once():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption(world=1) as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.agreed(4) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def workers_of(agent):
    """PIDs of an agent's workers."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children if b"worker.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until_gone(pids, timeout):
    deadline = time.monotonic() + timeout
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("the workers go on")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGUSR1, ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",)),
        (signal.SIGKILL, ()),  # and so does SIGUSR1 without the flag
    ],
)
def test_workers_of_a_signalled_or_killed_agent_commit_and_leave(ranks, number, flags):
    ranks.torchrun(hang_s=30, steps=10_000, flags=flags)
    ranks.wait_for_steps(10)
    pids = workers_of(ranks.processes[0].pid)
    assert len(pids) == 2
    ranks.signal(0, number)
    wait_until_gone(pids, timeout=15)  # well below the 30 s after which torchrun kills
    assert ranks.wait(0) == (1 if number == signal.SIGTERM or flags else -number)
    step = left_together(ranks)
    assert f": step {step} is committed; resume: cd " in ranks.errors(0)
