"""A job is watched until it is over, and no earlier: SLURM has many states that pass."""

from __future__ import annotations

import pytest

from data_prep.errors import WorkFailed
from launchers import slurm_queue
from launchers.slurm_queue import Submitted


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """scontrol(answer, answer, ...): what it says, one time after another; an empty answer is an error."""
    monkeypatch.setattr(slurm_queue, "_POLL_S", 0.01)

    def says(*answers):
        told = tmp_path / "answers"
        told.write_text("".join(f"{answer}\n" for answer in answers))
        program = tmp_path / "scontrol"
        program.write_text(
            f'#!/bin/bash\nanswer=$(head -n 1 {told})\n[ "$(wc -l < {told})" -gt 1 ] && sed -i 1d {told}\n'
            '[ -n "$answer" ] || exit 1\nfor state in $answer; do echo "JobId=7 JobState=$state Reason=x"; done\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return says


@pytest.mark.parametrize("passing", ["SIGNALING", "REQUEUED", "STAGE_OUT", "SUSPENDED", "RESIZING", "COMPLETING", ""])
def test_a_state_that_passes_is_not_the_end(scontrol, tmp_path, passing):
    scontrol("PENDING", "RUNNING", passing, "RUNNING", "COMPLETED")
    log = tmp_path / "log"
    log.write_text("step 1\n")
    said = []
    assert slurm_queue.follow(Submitted("7", log), said.append) == "COMPLETED"
    assert sorted(said) == ["job 7 waits in the queue\n", "step 1\n"]


@pytest.mark.parametrize("last", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"])
def test_an_end_is_the_end(scontrol, tmp_path, last):
    scontrol("RUNNING", last)
    assert slurm_queue.follow(Submitted("7", tmp_path / "log"), lambda text: None) == last


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ("COMPLETED RUNNING PENDING", "RUNNING"),
        ("COMPLETED REQUEUED FAILED", "REQUEUED"),
        ("COMPLETED FAILED COMPLETED", "FAILED"),
        ("COMPLETED COMPLETED", "COMPLETED"),
    ],
)
def test_an_array_is_as_alive_as_its_liveliest_part_and_as_bad_as_its_worst(scontrol, states, told):
    scontrol(states)
    assert slurm_queue.state("7") == told


def test_a_job_that_slurm_forgot_is_an_error(scontrol, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_queue, "_GONE_S", 0.1)
    scontrol("RUNNING", "")
    with pytest.raises(WorkFailed, match="SLURM does not know job 7 any more; its last state was RUNNING"):
        slurm_queue.follow(Submitted("7", tmp_path / "log"), lambda text: None)
