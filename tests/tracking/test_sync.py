"""`medpretrain sync`: what is in the run folder is on the server, once, whatever happened before."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import UserError, WorkFailed
from medpretrain import cli
from medpretrain.tracking.metrics_log import MetricsLog, read_metrics
from medpretrain.tracking.replay import sync
from medpretrain.tracking.state import RunState, server_file
from tests.tracking.runs import expected, free_port, hanging_server, history, make_run, run_id, track, wait_for, write

mlflow = pytest.importorskip("mlflow", reason="the train extra brings it")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_a_fresh_server_gets_exactly_the_rows_also_of_a_run_that_was_rolled_back(run, database, tmp_path):
    write(run, range(10))
    track(run, database).close(60)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.truncate_after(4)
        for step in range(5, 12):
            log.append({"step": step, "loss": 1 / (step + 1), "bad": math.inf if step == 6 else math.nan})
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    synced = sync(run, fresh, experiment="elsewhere")
    assert (synced.rows, synced.points, synced.there) == (12, 12 + 7, 0)
    assert history(run, fresh) == expected(range(12))
    client = mlflow.MlflowClient(fresh)
    times = {point.step: point.timestamp for point in client.get_metric_history(run_id(run, fresh), "loss")}
    assert times == {row["step"]: int(row["time"] * 1000) for row in read_metrics(run / "metrics.jsonl")}
    logged = client.get_run(run_id(run, fresh))
    assert client.get_experiment(logged.info.experiment_id).name == "elsewhere"
    assert logged.data.params["method.name"] == "simclr"
    assert {file.path for file in client.list_artifacts(logged.info.run_id)} == {
        *("recipe.yaml", "curves.png", "curves.svg")
    }
    again = sync(run, fresh)
    assert (again.points, again.there) == (0, 12 + 7)


def test_a_server_whose_database_was_set_back_gets_what_it_lost(run, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    write(run, range(5))
    sync(run, uri)
    backup = (tmp_path / "mlflow.db").read_bytes()
    write(run, range(5, 9))
    assert sync(run, uri).points == 4
    (tmp_path / "mlflow.db").write_bytes(backup)
    other = tmp_path / "copy.db"  # this process has the first one open
    other.write_bytes(backup)
    moved = f"sqlite:///{other}"
    server_file(run, moved).write_text(server_file(run, uri).read_text())
    synced = sync(run, moved)
    assert (synced.points, synced.there) == (4, 5)
    assert history(run, moved) == expected(range(9))


@pytest.mark.parametrize(("recorded", "shown"), [("FINISHED", "FINISHED"), ("FAILED", "FAILED"), ("RUNNING", "KILLED")])
def test_a_server_is_told_how_the_run_ended(run, database, recorded, shown):
    write(run, [0])
    RunState.of(run).set(run, recorded)
    sync(run, database)
    assert mlflow.MlflowClient(database).get_run(run_id(run, database)).info.status == shown


def test_a_run_in_training_stays_running_and_is_not_sent_to_a_server_twice_at_once(run, database, tmp_path):
    write(run, [0])
    tracker = track(run, database)
    wait_for(lambda: server_file(run, database).exists())
    with pytest.raises(UserError, match="another process right now"):
        sync(run, database)
    code = "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
    code += "print('held', flush=True); time.sleep(120)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(run / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        other = f"sqlite:///{tmp_path / 'other.db'}"
        sync(run, other)
        assert mlflow.MlflowClient(other).get_run(run_id(run, other)).info.status == "RUNNING"
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()
    tracker.close(60)


@pytest.mark.distributed
def test_a_sync_that_was_killed_is_ended_by_the_same_command(run, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    write(run, range(20_000))
    command = [sys.executable, "-m", "medpretrain", "sync", str(run), "--uri", uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: '"step": -1' not in _text(server_file(run, uri)) != "")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    assert '"step": 19999' not in _text(server_file(run, uri))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows, sent, there = (int(word) for word in done.stdout.split() if word.isdigit())
    assert rows == 20_000
    assert sent + there == 20_000
    assert there > 0
    assert history(run, uri) == expected(range(20_000))


def _text(file):
    return file.read_text() if file.exists() else ""


def test_no_torch_is_needed():
    code = "import sys, medpretrain.cli, medpretrain.tracking.replay, medpretrain.tracking.sender; "
    code += "sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_cannot_be_reached_is_one_line_without_secrets(run, hangs, monkeypatch, capsys):
    write(run, range(3))
    with hanging_server() as hanging:
        host = hanging.removeprefix("http://") if hangs else f"127.0.0.1:{free_port()}"
        started = time.monotonic()
        with pytest.raises(WorkFailed, match=r"no useful answer in 2 s") as failed:
            sync(run, f"http://alice:s3cr3t-w0rd@{host}", timeout_s=2)
        assert time.monotonic() - started < 30
    shown = str(failed.value) + capsys.readouterr().err
    assert "\n" not in str(failed.value)
    assert "s3cr3t" not in shown
    assert "alice" not in shown
    assert sync(run, f"sqlite:///{run.parent / 'mlflow.db'}").points == 3


def test_what_cannot_be_sent_is_a_users_mistake(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a run folder"):
        sync(tmp_path)
    secret = make_run(tmp_path / "secret", **{"tracking.uri": "http://alice:s3cr3t@127.0.0.1:1"})
    write(secret, [0])
    assert "s3cr3t" not in (secret / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"give --uri"):
        sync(secret)
    monkeypatch.setattr(sys, "argv", ["medpretrain", "sync", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
