"""Who is named from what the ranks last said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medpretrain.health.heartbeat import Beat, Seen
from medpretrain.health.verdict import judge

WAITS = ("train.py:10 train", "/x/torch/distributed/distributed_c10d.py:9 all_reduce")


def beat(rank, **more):
    known = {"host": f"node{rank}", "place": f"node{rank}/1", "pid": 100 + rank, "born": "1", "idle_s": 10.0}
    known |= {"step": 7, "phase": "step", "stack": WAITS}
    return Beat(3, rank, **known | more)


def verdict(others, own=None, unanswered_s=0.0, silent=(), world=None):
    seen = {each.rank: Seen(each, 10.0 if each.rank in silent else 0.5) for each in others}
    return judge(own or beat(0), seen, world or len(seen) + 1, silent_s=5.0, unanswered_s=unanswered_s)


@pytest.mark.parametrize(
    ("found", "culprits", "words"),
    [
        (verdict([beat(1), beat(2)], silent=[2]), [2], "rank 2 (node2, pid 102) is silent, last at step 7, step"),
        (verdict([beat(1, step=6), beat(2)]), [1], "is still at step 6, step, in "),
        (verdict([beat(1, phase="data"), beat(2)]), [1], "rank 1 (node1, pid 101) is still at step 7, data"),
        (verdict([beat(1), beat(2)], own=beat(0, phase="save")), [0], "rank 0 (node0, pid 100) is still at"),
        (verdict([beat(1, stack=("my.py:3 spin",)), beat(2)]), [1], "in my.py:3 spin, while the others wait for it"),
        (verdict([beat(1), beat(2, left="ValueError")]), [2], "left the run at step 7 (ValueError)"),
        (verdict([beat(1), beat(2)]), [], "all 3 ranks stand at step 7, step"),
        (verdict([beat(0), beat(2)], own=beat(1), unanswered_s=9), [0], "the store on rank 0's host of node0"),
        (verdict([beat(1)], world=3), [], "nothing was ever heard of rank 2"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(found, culprits, words):
    assert [each.rank for each in found.culprits] == culprits
    assert words in found.cause
    assert found.cause.startswith("no progress for 10 s: ")


def test_a_process_of_this_host_is_looked_up_and_a_pid_used_again_is_not_taken_for_it():
    own = Beat.of_this_process(1)
    assert own.process_state() == ""
    assert replace(own, born="1").process_state() == "gone"
    assert replace(own, place="elsewhere").process_state() is None
    gone = verdict([replace(own, born="1", stack=WAITS, idle_s=10.0, phase="step", step=7), beat(2)])
    assert [each.rank for each in gone.culprits] == [1]


def test_a_beat_survives_the_journey():
    one = beat(4, threads=("MainThread", "watchdog"), probe_s=0.25, left="done")
    assert Beat.from_json(one.to_json().encode()) == one
