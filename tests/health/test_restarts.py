"""Restarts that bring nothing end; a start by hand goes on."""

from __future__ import annotations

import pytest

from medpretrain.health import last_words
from medpretrain.health.restarts import NoProgress, going_on, refuse_no_progress


@pytest.fixture
def started(tmp_path, monkeypatch):
    """started(step, torchrun, slurm): whether a start from `step` is let pass."""

    def start(step, torchrun=0, slurm=0):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(torchrun))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(slurm))
        try:
            refuse_no_progress(tmp_path, step, limit=3)
        except NoProgress:
            return False
        return True

    return start


def test_three_restarts_from_one_step_pass_and_the_fourth_does_not(started):
    assert [started(0)] + [started(0, torchrun=count) for count in (1, 2, 3, 4, 5)] == [True] * 4 + [False] * 2


def test_progress_or_a_start_by_hand_counts_anew(started):
    assert all([started(5, slurm=1), started(5, slurm=2), started(6, slurm=3), started(6, slurm=4)])
    assert started(6, slurm=5)
    assert not started(6, slurm=6)
    assert started(6)
    assert all(started(6, torchrun=count) for count in (1, 2, 3))
    assert not started(6, torchrun=4)


def test_torn_lines_of_killed_runs_are_passed_over(started, tmp_path):
    assert all(started(2, torchrun=count) for count in (1, 2))
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"time": 1, "st')
    assert started(2, torchrun=3)
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 4
    assert not started(2, torchrun=4)


def test_what_is_known_of_the_causes_is_said(started, tmp_path):
    for count in (1, 2, 3):
        assert started(2, torchrun=count)
        row = {"time": 4e9, "rank": 1, "host": "node7", "code": 1, "cause": "out of GPU memory"}
        last_words.append_row(tmp_path / "failures.jsonl", row)
    with pytest.raises(NoProgress, match=r"from step 2 .*rank 1 on node7: out of GPU memory \(3 x\).* by hand"):
        refuse_no_progress(tmp_path, 2, limit=3)


@pytest.mark.parametrize("asked", ["never", "/other/run"])
def test_what_was_asked_for_is_for_the_first_start_of_a_launch(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert going_on(tmp_path, asked) == asked, "the first start did not get so far"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    refuse_no_progress(tmp_path, 0, limit=3, resume=asked)
    assert going_on(tmp_path, asked) == asked, "somebody asks for it again"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert going_on(tmp_path, asked) == "auto"
    assert going_on(tmp_path, "/another") == "/another"


@pytest.mark.distributed
def test_torchrun_restarts_a_run_that_always_fails_until_it_is_refused(ranks, monkeypatch):
    # With the agent's store shared with the ranks, torch 2.15's restarted workers wait for each other for ever.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    ranks.torchrun(flags=("--max-restarts=3",), hang_s=30, fail="work", fail_rank=1, fail_at=2, restarts=1)
    assert ranks.wait(0, timeout=120) == 1
    starts = ranks.rows("starts.jsonl")
    assert [(row["step"], row["restart"], row["world"]) for row in starts] == [(0, 0, 2), (0, 1, 2)]
    refused = [row for row in ranks.rows("failures.jsonl") if row["code"] == 76]
    assert refused
    assert "rank 1 on " in refused[0]["cause"]
    assert "the loss is nan at step 5" in refused[0]["cause"]
    assert "1 restarts one after another went on from step 0" in ranks.errors(0)
