import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medpretrain.tracking import sender, session
from medpretrain.tracking.keys import safe_key, split_params
from medpretrain.tracking.metrics_log import MetricsLog
from medpretrain.tracking.redaction import redact
from medpretrain.tracking.sender import Tracker
from medpretrain.tracking.state import RunState, server_file
from tests.tracking.runs import LONG, acknowledged, expected, free_port, history, run_id, track, wait_for, write

mlflow = pytest.importorskip("mlflow", reason="the train extra brings it")

ROOT = Path(__file__).parents[2]


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
    logged = client.get_run(run_id(run, database))
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "short"
    assert logged.data.params["lr"] == "0.1"
    assert "".join(logged.data.params[f"recipe.{part}"] for part in (1, 2, 3)) == LONG
    assert [file.path for file in client.list_artifacts(logged.info.run_id)] == ["recipe.yaml"]
    assert len(client.search_runs([logged.info.experiment_id])) == 1
    assert not [record for record in caplog.records if record.name in (sender.__name__, session.__name__)]


def test_mlflow_is_silent_in_a_process_of_its_own(run):
    write(run, range(3))
    code = "import sys; from pathlib import Path; from medpretrain.tracking.sender import Tracker\n"
    code += "Tracker(Path(sys.argv[1]), None, 'test', 'short', {}, []).close(60)"
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, cwd=run, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert history(run, f"sqlite:///{run.parent / 'mlflow.db'}") == expected(range(3))
    assert sorted(entry.name for entry in run.iterdir()) == ["metrics.jsonl", "recipe.yaml", "tracking"]


def test_rows_of_one_step_on_either_side_of_a_resume_all_arrive(run, database):
    write(run, [4])
    track(run, database).close(60)
    write(run, [4], knn=0.7)
    track(run, database).close(60)
    assert history(run, database, "knn") == [(4, 0.7)]


def test_a_batch_whose_acknowledgement_was_lost_is_kept_once(run, database):
    write(run, range(5))
    track(run, database).close(60)
    file = server_file(run, database)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 1, "nth": 1}))
    track(run, database).close(60)
    assert history(run, database) == expected(range(5))


def test_a_run_whose_creation_was_not_acknowledged_is_found_again(run, database):
    write(run, range(2))
    track(run, database).close(60)
    file = server_file(run, database)
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
    logged = mlflow.MlflowClient(database).get_run(run_id(run, database))
    assert logged.info.status == "FAILED"
    assert (logged.data.params["lr"], logged.data.params["new"]) == ("0.1", "1")


def test_a_missing_artifact_is_named_and_metrics_go_on(run, database, caplog):
    write(run, [0])
    track(run, database, artifacts=[run / "gone.yaml"]).close(60)
    assert "gone.yaml" in caplog.text
    assert history(run, database) == expected([0])


def test_a_lost_state_file_finds_the_run_again_and_doubles_nothing(run, database):
    write(run, range(5))
    track(run, database).close(60)
    before = run_id(run, database)
    server_file(run, database).write_text("{")
    write(run, [5])
    track(run, database).close(60)
    assert run_id(run, database) == before
    assert history(run, database) == expected(range(6))


def test_steps_measured_again_with_other_values_are_sent_and_equal_points_are_there_once(run, database):
    write(run, range(10))
    tracker = track(run, database)
    with MetricsLog(run / "metrics.jsonl") as log:
        for step in range(10, 20):
            log.append({"step": step, "loss": 1 / (step + 1), "speed": step + 0.5})
        wait_for(lambda: acknowledged(run, database) == 19)
        log.truncate_after(11)
        for step in range(12, 22):  # the loss is the same again but for steps 14 and 15; the speed is always another
            log.append({"step": step, "loss": 1 / (step + 1) + (step in (14, 15)), "speed": step + 0.25})
    tracker.close(60)
    again = [(step, 1 / (step + 1) + 1) for step in (14, 15)]
    assert history(run, database) == sorted(expected(range(22)) + again)
    abandoned = [(step, step + 0.5) for step in range(10, 20)]
    assert history(run, database, "speed") == sorted(abandoned + [(step, step + 0.25) for step in range(12, 22)])
    track(run, database).close(60)
    assert history(run, database) == sorted(expected(range(22)) + again)


def test_a_rollback_while_nobody_sends_and_a_lost_acknowledgement_leave_no_double(run, database):
    write(run, range(8))
    track(run, database).close(60)
    file = server_file(run, database)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 4, "nth": 1}))  # 5 to 7 arrived nevertheless
    with MetricsLog(run / "metrics.jsonl") as log:
        log.truncate_after(5)
    write(run, range(6, 9))
    track(run, database).close(60)
    assert history(run, database) == expected(range(9))


def test_rows_rolled_back_during_an_outage_never_leave(run, database, monkeypatch, caplog):
    real, away = mlflow.MlflowClient.log_batch, True

    def flaky(self, *args, **kwargs):
        if away and kwargs.get("metrics"):
            raise mlflow.MlflowException("away")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(sender, "_FIRST_WAIT_S", 0.05)
    write(run, range(6), value=lambda step: 7.0)
    tracker = track(run, database)
    wait_for(lambda: "no metrics reach" in caplog.text)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.truncate_after(1)
    write(run, range(2, 5))
    away = False
    tracker.close(60)
    assert history(run, database) == [(0, 7.0), (1, 7.0), *expected(range(2, 5))]


def test_each_server_has_its_own_state_and_all_rows(run, database, tmp_path):
    write(run, [0, 1])
    track(run, database).close(60)
    first = server_file(run, database).read_text()
    other = f"sqlite:///{tmp_path / 'other.db'}"
    track(run, other).close(60)
    assert history(run, other) == expected([0, 1])
    assert server_file(run, database).read_text() == first


def test_a_server_that_lost_its_database_gets_everything_again(run, database, caplog):
    write(run, [0, 1])
    track(run, database).close(60)
    file = server_file(run, database)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run_id": "0" * 32}))
    state = RunState.of(run)
    state.key = "of a run that is not there"
    state.write(run)
    track(run, database).close(60)
    assert "no longer has this run" in caplog.text
    assert history(run, database) == expected([0, 1])


def test_without_a_uri_a_database_beside_the_run_folder_is_used(run, monkeypatch):
    monkeypatch.setattr(Tracker, "_work", lambda self: None)
    assert track(run, None)._uri == f"sqlite:///{run.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert track(run, None)._uri == "http://127.0.0.1:1"


def test_none_means_no_tracking(run):
    write(run, [0])
    track(run, "none").close(1)
    assert [entry.name for entry in (run / "tracking").iterdir()] == ["run.json"]


def test_a_dead_server_costs_a_warning_and_no_secret(run, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    write(run, range(30))
    tracker = track(run, f"http://alice:s3cr3t-w0rd@127.0.0.1:{free_port()}")
    wait_for(lambda: "no metrics reach" in caplog.text)
    write(run, range(30, 40))
    started = time.monotonic()
    tracker.close(2)
    assert time.monotonic() - started < 20  # MLflow alone would block for minutes
    warnings = [record.getMessage() for record in caplog.records if record.name in (sender.__name__, session.__name__)]
    assert len(warnings) == 2
    assert "no metrics reach MLflow at http://***@127.0.0.1" in warnings[0]
    assert warnings[1].startswith("40 rows were not sent to MLflow")
    assert f"medpretrain sync {run}" in warnings[1]
    out = capfd.readouterr()
    everything = caplog.text + out.out + out.err + "".join(file.read_text() for file in (run / "tracking").iterdir())
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
    monkeypatch.setattr(sender, "_FIRST_WAIT_S", 0.05)
    write(run, range(1500))
    tracker = track(run, database)
    wait_for(lambda: "works again" in caplog.text)
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
