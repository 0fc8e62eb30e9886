"""The batch script, run by a real bash with stand-ins for SLURM's commands: what it does about each end and signal.

That SLURM itself plays along is shown in tests/cluster.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from launchers.job import PrepJob
from launchers.site import Site
from launchers.slurm import RESTARTS, Request, prep_script, train_script

STAND_INS = {
    # Notes its words and what a task sees, then does what the next line of `ends` says.
    "srun": """\
        words=$(printf ' <%s>' "$@"); echo "srun${words//$'\\n'/ }" >> "$NOTES"
        at=$MASTER_ADDR:$MASTER_PORT
        echo "restart $MEDPRETRAIN_RESTART_COUNT at $at with $SRUN_CPUS_PER_TASK cores" >> "$NOTES"
        end=$(head -n 1 "$ENDS"); sed -i 1d "$ENDS"
        if [ "$end" = asked ]; then
            trap 'echo "srun was told USR1" >> "$NOTES"; exit 75' USR1
            echo waits >> "$NOTES"
            while :; do command sleep 0.05; done
        fi
        exit "$end"
    """,
    "scontrol": """\
        case "$1 $2" in
            "show hostnames") printf 'n1\\nn2\\n' ;;
            "show job") echo "JobId=$3 JobState=$STATE Reason=None" ;;
            *) echo "scontrol $*" >> "$NOTES" ;;
        esac
    """,
    "sleep": 'echo "slept $1" >> "$NOTES"',
}

REQUEUED = ["scontrol requeue 20007", "slept 300"]
"""A script that ended by itself in a pre-emption's grace would end the job: it waits for SLURM."""


@pytest.fixture
def batch(tmp_path):
    """batch(script, ends, state): the running script; its notes are lines of a file."""
    started = []
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)

    def start(script, ends, state="RUNNING"):
        (tmp_path / "job").write_text(script)
        (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
        (tmp_path / "notes").touch()
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NOTES": str(tmp_path / "notes"),
            "ENDS": str(tmp_path / "ends"),
            "STATE": state,
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "32",
        }
        process = subprocess.Popen(["bash", tmp_path / "job"], env=environment, start_new_session=True)
        started.append(process)
        process.notes = lambda: (tmp_path / "notes").read_text().splitlines()
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def script_of(job, site=None, preflight=False, **request):
    return train_script(job, site or Site(), Request(nodes=2, gpus=4, **request), Path("/logs/%j"), preflight=preflight)


def test_a_run_that_is_done_ends_the_job_and_its_words_arrive_as_they_were_given(batch, job):
    process = batch(script_of(job), [0])
    assert process.wait(20) == 0
    srun, seen = process.notes()
    assert srun.endswith("<-m> <medpretrain> <train> <my recipe.yaml> <views.global.crop=[0.5, 1]> <data.path=[a,b]>")
    assert seen == "restart 0 at n1:15007 with 8 cores"


@pytest.mark.parametrize("code", [2, 76])
def test_what_would_fail_again_ends_the_job(batch, job, code):
    process = batch(script_of(job), [code])
    assert process.wait(20) == code
    assert len(process.notes()) == 2


def test_ranks_that_fail_are_started_again_and_counted(batch, job):
    process = batch(script_of(job), [1, 137, 77, 0])
    assert process.wait(20) == 0
    assert [line.split()[1] for line in process.notes() if line.startswith("restart")] == ["0", "1", "2", "3"]
    assert [line for line in process.notes() if line.startswith("slept")] == ["slept 10"] * 3


def test_restarts_come_to_an_end(batch, job):
    process = batch(script_of(job), [9] * 99)
    assert process.wait(30) == 9
    assert sum(line.startswith("restart") for line in process.notes()) == RESTARTS + 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_the_job_goes_back_into_the_queue(batch, job, number):
    process = batch(script_of(job), ["asked"])
    wait_for(process, "waits")
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.notes()[-3:] == ["srun was told USR1", *REQUEUED]


def test_a_job_that_was_cancelled_stays_cancelled(batch, job):
    process = batch(script_of(job), ["asked"], state="CANCELLED")
    wait_for(process, "waits")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.notes()[-1] == "srun was told USR1"


def test_ranks_that_were_asked_by_somebody_else_go_back_into_the_queue_too(batch, job):
    process = batch(script_of(job), [75])
    assert process.wait(20) == 0
    assert process.notes()[-2:] == REQUEUED


def test_preflight_is_the_gate(batch, job):
    process = batch(script_of(job, preflight=True), [1, 0])
    assert process.wait(20) == 1
    (gate, seen) = process.notes()
    assert gate.startswith("srun <--ntasks=2> <--ntasks-per-node=1> ")
    assert gate.endswith("<--nodes> <2> <--gpus> <4> <--head> <n1:15006> <--hosts> <n1,n2>")
    assert seen.endswith("with 32 cores"), "it starts the tasks of a node itself"


def test_preflight_that_is_asked_to_leave_goes_back_into_the_queue(batch, job):
    process = batch(script_of(job, preflight=True), ["asked", 0])
    wait_for(process, "waits")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert process.notes()[-2:] == REQUEUED
    assert sum(line.startswith("srun <") for line in process.notes()) == 1, "nothing was trained"


def test_without_a_head_nothing_runs(batch, job):
    process = batch(script_of(job).replace("scontrol show hostnames", "true"), [0])
    assert process.wait(20) == 1
    assert process.notes() == []


def test_the_request_and_the_site_are_in_the_header(job):
    site = Site.model_validate(
        {
            "environment": {"NCCL_DEBUG": "a b"},
            "setup": ["module load cuda"],
            "slurm": {"partition": "old", "account": "us", "signal_s": 60, "extra": ["--constraint=h100"]},
        }
    )
    request = Request.of(site, nodes=2, gpus=4, partition="new", time="1-00:00:00")
    script = train_script(job, site, request, Path("/logs/%j"))
    header = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--exclusive", "--requeue"} <= set(header)
    assert {"--partition=new", "--account=us", "--time=1-00:00:00", "--signal=B:USR1@60"} <= set(header)
    assert {"--open-mode=append", "--output=/logs/%j", "--constraint=h100"} <= set(header)
    assert "export NCCL_DEBUG='a b'\nmodule load cuda\n" in script


def test_a_setup_may_read_variables_that_are_not_set(batch, job):
    """As `module` and `conda activate` do."""
    process = batch(script_of(job, Site(setup=('echo "$NOT_SET_ANYWHERE"',))), [0])
    assert process.wait(20) == 0


def test_words_with_lines_in_them_stay_a_comment(batch, job):
    process = batch(script_of(replace(job, overrides=("about=a\nexit 9",))), [0])
    assert process.wait(20) == 0
    assert "<about=a exit 9>" in process.notes()[0]


@pytest.mark.parametrize(
    ("slurm", "line"),
    [({"gpu_option": "gres"}, "--gres=gpu:4"), ({"gpu_option": "none"}, None), ({}, "--gpus-per-node=4")],
)
def test_gpus_are_asked_for_as_the_cluster_wants_it(job, slurm, line):
    script = script_of(job, Site.model_validate({"slurm": slurm}))
    asked = [words for words in script.splitlines() if words.startswith("#SBATCH --g")]
    assert asked == ([f"#SBATCH {line}"] if line else [])


def test_pyxis_and_apptainer_run_the_image(batch, job, tmp_path):
    image = tmp_path / "train.sqsh"
    image.touch()
    site = Site(image=str(image), mounts=("/data:/data:ro", "/runs:/runs"))
    process = batch(script_of(job, site), [0])
    assert process.wait(20) == 0
    words = process.notes()[0]
    assert f"<--container-image={image}> <--container-mounts=/data:/data:ro,/runs:/runs>" in words
    assert "<python> <-m> <medpretrain> <train>" in words
    other = site.model_copy(update={"slurm": site.slurm.model_copy(update={"container": "apptainer"})})
    words = script_of(job, other)
    assert f"rank apptainer exec --nv --bind /data:/data:ro --bind /runs:/runs {image} python -m medpretrain" in words


def test_an_image_that_is_not_there_is_said_before_submission(job):
    with pytest.raises(UserError, match=r"there is no image no\.sqsh; docker/README.md says how to make one"):
        script_of(job, Site(image="no.sqsh"))


def test_tasks_that_do_not_divide_the_batch_are_said_before_submission(job):
    with pytest.raises(UserError, match=r"2 nodes x 4 tasks = 8 do not divide train\.global_batch=60"):
        script_of(replace(job, global_batch=60))


def test_an_array_does_each_part_once(batch, monkeypatch):
    job = PrepJob(("images", "in put", "out", "--split", "train=0.8,test=0.2"), 3, "out")
    script = prep_script(job, Site(cpus=6), Request(cpus=6), Path("/logs/%A_%a"))
    assert "#SBATCH --array=1-3\n" in script
    assert "#SBATCH --cpus-per-task=6\n" in script
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    process = batch(script, [0])
    assert process.wait(20) == 0
    expected = "<prep> <images> <in put> <out> <--split> <train=0.8,test=0.2> <--part> <2/3> <--workers> <6>"
    assert expected in process.notes()[0]


def wait_for(process, note):
    deadline = time.monotonic() + 20
    while note not in process.notes():
        assert process.poll() is None, process.notes()
        assert time.monotonic() < deadline
        time.sleep(0.02)
