"""Losses that are not finite: left out, taken back, and at last the end with the cause."""

from __future__ import annotations

import socket

import pytest

from tests.faults.running import committed, events, read_metrics, steps

pytestmark = pytest.mark.distributed
STEPS = 20


def test_a_bad_batch_is_left_out_and_a_bad_stretch_is_taken_back_and_the_run_ends_well(runs, tmp_path):
    run = tmp_path / "run"
    faults = [
        {"fault": "nan", "rank": 1, "steps": [3]},
        {"fault": "nan", "rank": 1, "steps": [12, 13, 14], "until": str(tmp_path / "over")},
    ]
    ranks = runs.ranks(f"run.dir={run}", f"train.steps={STEPS}", "faults.skip=2", faults=faults)
    runs.end_well(ranks)

    left_out, back = events(run, "skipped"), events(run, "rollback")
    assert [row["step"] for row in left_out] == [4, 13, 14, 15]
    assert [row["ranks"] for row in left_out] == [[1]] * 4
    assert [(row["step"], row["to"]) for row in back] == [(15, 10)]
    metrics = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1)), "each step once"
    assert [row["step"] for row in metrics if row["loss"] != row["loss"]] == [4]
    assert metrics[2]["skipped_steps"] == 0
    assert metrics[3]["skipped_steps"] == 1
    assert metrics[-1]["skipped_steps"] == 4
    assert committed(run) == [5, 10, 15, 20]
    assert "step 4 is left out: the loss of rank 1 (" in runs.said(ranks[0])
    assert "back to step 10" in runs.said(ranks[0])


def test_a_loss_that_stays_bad_ends_the_run_with_cause_rank_host_and_the_command_to_resume(runs, tmp_path):
    run = tmp_path / "run"
    faults = [{"fault": "nan", "rank": 1, "steps": list(range(7, STEPS))}]
    ranks = runs.ranks(f"run.dir={run}", f"train.steps={STEPS}", "faults.skip=1", faults=faults)
    assert runs.end(ranks) == [1, 1]
    (said,) = [line for line in map(runs.last_line, ranks) if line.startswith("error on ")]
    host = socket.gethostname()
    assert (
        f"not finite in 2 steps up to 9, at last the loss of rank 1 ({host}) again, after 1 rollback. A lower" in said
    )
    assert "; resume: cd " in said
    assert f"run.dir={run}" in said
    assert [(row["step"], row["to"]) for row in events(run, "rollback")] == [(9, 5)]
    assert [row["step"] for row in events(run, "skipped")] == [8, 9, 8, 9]
    assert steps(run)[:5] == [1, 2, 3, 4, 5]
    assert committed(run) == [5]
    assert "Traceback" not in runs.said(ranks[0]) + runs.said(ranks[1])


def test_bad_losses_before_the_first_checkpoint_end_the_run_and_say_so(runs, tmp_path):
    run = tmp_path / "run"
    (rank,) = runs.ranks(
        f"run.dir={run}", "faults.skip=1", world=1, faults=[{"fault": "nan", "steps": list(range(1, 30))}]
    )
    assert runs.end([rank]) == [1]
    assert "in 2 steps up to 3, at last the loss of rank 0 (" in runs.last_line(rank)
    assert "and there is no checkpoint yet to go back to" in runs.last_line(rank)
    assert not committed(run)
