import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medpretrain.training import tracking
from medpretrain.training.metrics_log import MetricsLog
from medpretrain.training.tracking import Tracker, redact, safe_key, split_params

mlflow = pytest.importorskip("mlflow", reason="the train extra brings it")

LONG = "x" * 12_500
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Tracker fills in MLflow's variables for the process; undo that after each test."""
    for name in [*tracking._ENVIRONMENT, "MLFLOW_TRACKING_URI"]:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One SQLite store for all tests: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    return tmp_path / "a run"


def track(run, uri, **changes):
    arguments = {
        "experiment": "test",
        "run_name": "short",
        "params": {"lr": "0.1", "recipe": LONG},
        "artifacts": [run.parent / "recipe.yaml"],
        "interval_s": 0.05,
    }
    return Tracker(run, uri, **(arguments | changes))


def write(run, steps, **more):
    with MetricsLog(run / "metrics.jsonl") as log:
        for step in steps:
            log.append({"step": step, "loss": 1 / (step + 1), **more})


def history(run, uri, key="loss"):
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    points = mlflow.MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def expected(steps):
    return [(step, 1 / (step + 1)) for step in steps]


def test_rows_arrive_once_also_over_a_resume_in_the_same_folder(run, database, caplog):
    write(run, range(3))
    tracker = track(run, database)
    write(run, range(3, 700), phase="warm-up", a=0.5, b=True)  # more than one call's 1,000 metrics
    tracker.close(60)
    assert history(run, database) == expected(range(700))
    assert len(history(run, database, "a")) == len(history(run, database, "b")) == 697

    with MetricsLog(run / "metrics.jsonl") as log:
        log.truncate_after(650)
        for step in range(651, 750):  # 651 to 699 are measured again
            log.append({"step": step, "loss": 1 / (step + 1)})
    track(run, database).close(60)
    assert history(run, database) == expected(range(750))

    client = mlflow.MlflowClient(database)
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "short"
    assert logged.data.params["lr"] == "0.1"
    assert "".join(logged.data.params[f"recipe.{part}"] for part in (1, 2, 3)) == LONG
    assert [file.path for file in client.list_artifacts(run_id)] == ["recipe.yaml"]
    assert len(client.search_runs([logged.info.experiment_id])) == 1
    assert not [record for record in caplog.records if record.name == tracking.__name__]


def test_mlflow_is_silent_in_a_process_of_its_own(run):
    write(run, range(3))
    code = "import sys; from pathlib import Path; from medpretrain.training.tracking import Tracker\n"
    code += "Tracker(Path(sys.argv[1]), None, 'test', 'short', {}, []).close(60)"
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, cwd=run, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert history(run, f"sqlite:///{run.parent / 'mlflow.db'}") == expected(range(3))
    assert sorted(entry.name for entry in run.iterdir()) == ["metrics.jsonl", "mlflow.json"]


def test_rows_of_one_step_on_either_side_of_a_resume_all_arrive(run, database):
    write(run, [4])
    track(run, database).close(60)
    write(run, [4], knn=0.7)
    track(run, database).close(60)
    assert history(run, database, "knn") == [(4, 0.7)]


def test_a_batch_whose_acknowledgement_was_lost_is_kept_once(run, database):
    write(run, range(5))
    track(run, database).close(60)
    file = run / "mlflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 1, "nth": 1}))
    track(run, database).close(60)
    assert history(run, database) == expected(range(5))


def test_a_run_whose_creation_was_not_acknowledged_is_found_again(run, database):
    write(run, range(2))
    track(run, database).close(60)
    file = run / "mlflow.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"run_id": None, "step": -1, "nth": 0}))
    track(run, database).close(60)
    assert json.loads(file.read_text()) == before


def test_changed_parameters_are_named_and_nan_is_no_hindrance(run, database, caplog):
    write(run, [0])
    track(run, database).close(60)
    write(run, [1], bad=math.nan)
    track(run, database, params={"lr": "0.2", "new": "1"}).close(60, status="FAILED")
    assert "have changed since: lr" in caplog.text
    ((step, value),) = history(run, database, "bad")
    assert step == 1
    assert math.isnan(value)
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    logged = mlflow.MlflowClient(database).get_run(run_id)
    assert logged.info.status == "FAILED"
    assert (logged.data.params["lr"], logged.data.params["new"]) == ("0.1", "1")


def test_a_missing_artifact_is_named_and_metrics_go_on(run, database, caplog):
    write(run, [0])
    track(run, database, artifacts=[run / "gone.yaml"]).close(60)
    assert "gone.yaml" in caplog.text
    assert history(run, database) == expected([0])


def test_another_server_gets_all_rows_in_a_new_run(run, database, caplog):
    write(run, [0, 1])
    track(run, database).close(60)
    first = json.loads((run / "mlflow.json").read_text())
    file = run / "mlflow.json"
    file.write_text(json.dumps(first | {"uri_sha256": "of another"}))
    track(run, database).close(60)
    assert "another MLflow server" in caplog.text
    assert json.loads(file.read_text())["run_id"] != first["run_id"]
    assert history(run, database) == expected([0, 1])


def test_without_a_uri_a_database_beside_the_run_folder_is_used(run, monkeypatch):
    monkeypatch.setattr(Tracker, "_work", lambda self: None)
    assert track(run, None)._uri == f"sqlite:///{run.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert track(run, None)._uri == "http://127.0.0.1:1"


def test_none_means_no_tracking(run):
    write(run, [0])
    track(run, "none").close(1)
    assert not (run / "mlflow.json").exists()


@pytest.fixture
def dead_port():
    with socket.socket() as probe:  # bound and never listening: connections are refused
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def test_a_dead_server_costs_a_warning_and_no_secret(run, dead_port, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    write(run, range(30))
    tracker = track(run, f"http://alice:s3cr3t-w0rd@127.0.0.1:{dead_port}")
    while "no metrics reach" not in caplog.text:
        time.sleep(0.05)
    write(run, range(30, 40))
    started = time.monotonic()
    tracker.close(2)
    assert time.monotonic() - started < 20  # MLflow alone would block for minutes
    warnings = [record.getMessage() for record in caplog.records if record.name == tracking.__name__]
    assert len(warnings) == 2
    assert "no metrics reach MLflow at http://***@127.0.0.1" in warnings[0]
    assert warnings[1].startswith("40 rows were not sent to MLflow")
    assert str(run / "metrics.jsonl") in warnings[1]
    out = capfd.readouterr()
    everything = caplog.text + out.out + out.err + (run / "mlflow.json").read_text()
    assert "s3cr3t" not in everything
    assert "alice" not in everything


def test_rows_of_an_outage_arrive_when_the_server_is_back(run, database, monkeypatch, caplog):
    real, calls = mlflow.MlflowClient.log_batch, 0

    def flaky(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls in (2, 3, 5):
            raise mlflow.MlflowException("away")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(tracking, "_FIRST_WAIT_S", 0.05)
    write(run, range(1500))
    tracker = track(run, database)
    while "works again" not in caplog.text:
        time.sleep(0.05)
    tracker.close(60)
    assert history(run, database) == expected(range(1500))
    assert "rows were not sent" not in caplog.text


def test_keys_are_made_safe_and_stay_apart():
    assert safe_key("train/loss") == "train/loss"
    changed = {safe_key(name) for name in ("a@b", "a%b", "a//b", "../b", "/b", "", "é", "k" * 300, "k" * 301)}
    assert len(changed) == 9
    assert max(map(len, changed)) == 250
    assert split_params({"a": "1"}) == {"a": "1"}


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("no route to postgresql://bob:hunter2@db:5432/x", ""),
        ("FATAL for hunter2", "postgresql://bob:hunter2@db/x"),
        ("FATAL for hunt@er2", "postgresql://bob:hunt%40er2@db/x"),
        ("postgresql://bob:hun/ter2:hunter2@db/x failed", ""),
        ("http://h/api?password=hunter2&x=1", ""),
    ],
)
def test_no_password_passes(text, uri):
    shown = redact(text, uri)
    assert "er2" not in shown
    assert "***" in shown
