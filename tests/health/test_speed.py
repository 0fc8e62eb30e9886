"""A slow rank is named, and no other."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from medpretrain.health.heartbeat import Beat
from medpretrain.health.speed import Comparison


def beats(*probes, waits=None):
    waits = waits or [0.0] * len(probes)
    return {
        rank: Beat(1, rank, "node", "node/1", 1, "1", probe_s=probe, data_wait=wait)
        for rank, (probe, wait) in enumerate(zip(probes, waits, strict=True))
    }


def named(comparison, rounds):
    return [[(slow.beat.rank, slow.why) for slow in comparison.update(each)] for each in rounds]


def test_a_rank_is_named_after_six_times_in_a_row_once_and_again_after_it_recovered():
    slow, even = beats(1.0, 1.6, 1.0), beats(1.0, 1.1, 0.9)
    once = [[]] * 5 + [[(1, "computes")]]
    assert named(Comparison(1.5), [slow] * 9 + [even] * 6 + [slow] * 6) == [*once, *[[]] * 9, *once]
    assert named(Comparison(1.5), [slow] * 6 + [even, slow] * 9) == [*once, *[[]] * 18], "it did not recover"
    assert named(Comparison(1.5), [*[slow] * 5, even] * 3) == [[]] * 18
    assert named(Comparison(1.7), [slow] * 9) == [[]] * 9


def test_the_others_are_the_measure_even_of_two():
    assert named(Comparison(1.5), [beats(1.0, 1.6)] * 6)[-1] == [(1, "computes")]
    assert named(Comparison(1.5), [beats(None, 1.6)] * 6)[-1] == []


def test_waiting_for_data_counts_from_a_twentieth_of_the_time():
    assert named(Comparison(1.5), [beats(1, 1, 1, waits=[0, 0.4, 0.01])] * 6)[-1] == [(1, "data")]
    assert named(Comparison(1.5), [beats(1, 1, 1, waits=[0, 0.04, 0.01])] * 6)[-1] == []
    assert named(Comparison(1.5), [beats(1, 1, 1, waits=[0.5, 0.6, 0.5])] * 6)[-1] == []


def slow_events(ranks):
    return [(event["why"], event["slow_rank"]) for event in ranks.rows("events0.jsonl")]


@pytest.mark.distributed
def test_a_rank_that_is_held_up_is_named_and_an_even_pair_is_not(ranks):
    # Held up for fifteen sixteenths of the time and named from a factor of three: where a busy machine takes half of a
    # core from the other rank, there is still enough between them.
    ranks.start(steps=20_000, hang_s=20, probe_s=0.2, own_core=1, pause=0.005, slow=3)
    ranks.wait_for_steps(400, timeout=90)
    assert not slow_events(ranks)
    held = threading.Event()

    def hold_up():
        while not held.wait(0.002):
            ranks.signal(1, signal.SIGSTOP)
            time.sleep(0.03)
            ranks.signal(1, signal.SIGCONT)

    holder = threading.Thread(target=hold_up)
    holder.start()
    try:
        deadline = time.monotonic() + 40
        while ("computes", 1) not in slow_events(ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        held.set()
        holder.join()
    assert ("computes", 1) in slow_events(ranks)
    assert {rank for _, rank in slow_events(ranks)} == {1}


@pytest.mark.distributed
def test_a_rank_with_slow_data_is_named(ranks):
    ranks.start(steps=150, hang_s=20, probe_s=0.2, slow_data=1, slow=3, pause=0.005)
    assert [ranks.wait(rank) for rank in (0, 1)] == [0, 0], ranks.errors(0)
    assert slow_events(ranks) == [("data", 1)]
