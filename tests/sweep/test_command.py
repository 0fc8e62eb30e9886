"""If these fail, `medpretrain sweep` does not do what its help says."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data_prep.errors import UserError, WorkFailed
from medpretrain.cli_sweep import sweep
from medpretrain.sweep import run as running
from medpretrain.sweep.run import SweepStopped
from medpretrain.tracking.metrics_log import read_metrics

RECIPE = """\
name: small
data: {channels: 1, threads: 1}
backbone: {name: test_resnet}
views: {crop: {size: 32, count: 2, crop: [0.3, 1], flip: 0.5}}
method: {name: simclr, projector: [8]}
optim: {name: sgd, lr: 0.01}
train: {steps: 2, global_batch: 4, log_every: 1, threads: 1}
tracking: {uri: none}
"""
SWEEP = """\
name: tiny
recipe: {recipe}
grid:
  - {{name: percent, set: ["data.fraction={{}}"], values: [50, 100]}}
evaluate: [{{protocol: linear, variant: exact}}]
"""

app = typer.Typer()
app.command()(sweep)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "tiny.yaml").write_text(SWEEP.format(recipe=tmp_path / "small.yaml"))
    return tmp_path / "tiny.yaml"


@pytest.fixture
def command(tmp_path, file, program, monkeypatch):
    """command(*words) -> what it printed; its errors are raised."""
    monkeypatch.setattr(running, "PROGRAM", program)

    def command(*words, data="data.path=shards"):
        result = CliRunner().invoke(app, [str(file), data, "--out", str(tmp_path / "out"), *words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return command


def test_a_dry_run_prints_every_command_and_starts_nothing(command, calls, tmp_path):
    said = command("--dry-run")
    assert "# 0: percent-50 (percent 50)" in said
    assert said.count(" train ") == said.count(" evaluate linear ") == 2
    assert "data.fraction=50" in said
    assert command("--dry-run", "--only", "1").count(" train ") == 1
    assert not calls()
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_no_run_is_refused(command):
    with pytest.raises(UserError, match="--only 2: the sweep tiny has runs 0 to 1"):
        command("--only", "2")


def test_parts_of_an_array_of_jobs_come_to_the_whole(command, tmp_path):
    command("--only", "1")
    said = command("--only", "0")
    lines = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [line["state"] for line in lines] == ["done", "done"]
    assert "0.5000" in said
    assert (tmp_path / "out" / "sweep.png").is_file()


def test_failures_end_it_with_1_and_a_list_after_the_others(command, tmp_path):
    (tmp_path / "fail-percent-50").touch()
    with pytest.raises(WorkFailed, match=r"1 of 2 runs failed; .*percent-50: train ended with 1: .*bad luck") as failed:
        command()
    assert failed.value.exit_code == 1
    lines = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [line["state"] for line in lines] == ["not done", "done"]


def test_it_ends_with_75_where_it_was_asked_to_leave(command, tmp_path):
    (tmp_path / "wait-percent-50").touch()
    code = (
        "import os, signal, sys, time\n"
        f"while not os.path.exists({str(tmp_path / 'waiting-percent-50')!r}): time.sleep(0.02)\n"
        "os.kill(int(sys.argv[1]), signal.SIGTERM)"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(os.getpid())])
    with pytest.raises(SweepStopped, match="the same command goes on") as stopped:
        command()
    asking.wait()
    assert stopped.value.exit_code == 75


def test_a_login_node_without_torch_and_scikit_learn_prints_the_commands(tmp_path, file):
    for absent in ("torch", "sklearn"):
        (tmp_path / f"{absent}.py").write_text(f"raise ModuleNotFoundError('no {absent} here', name='{absent}')")
    code = (
        f"import medpretrain.cli_sweep as c; c.sweep({str(file)!r}, ['data.path=x'], dry_run=True, launch='', jobs=1)"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(" train ") == 2


def test_two_trainings_differ_in_what_is_varied_and_go_on_where_they_stopped(command, calls, tmp_path, small_dataset):
    (tmp_path / "really").touch()
    (tmp_path / "accuracy.json").write_text(json.dumps({"percent-50": 0.5, "percent-100": 0.75}))
    said = command(data=f"data.path={small_dataset}")
    assert [call[0] for call in calls()] == ["train", "evaluate"] * 2
    out = tmp_path / "out"
    losses = [
        [row["loss"] for row in read_metrics(out / name / "metrics.jsonl")] for name in ("percent-50", "percent-100")
    ]
    assert all(len(one) == 2 for one in losses)
    assert losses[0] != losses[1]
    lines = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(line["percent"], line["accuracy"]) for line in lines] == [("50", "0.5"), ("100", "0.75")]
    assert "0.7500" in said
    command(data=f"data.path={small_dataset}")
    assert not calls()
