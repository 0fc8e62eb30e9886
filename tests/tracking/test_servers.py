"""Real servers on loopback, and servers that refuse, hang, fail or die: nothing waits for them, nothing is lost."""

import time

import pytest

from medpretrain.tracking import sender
from medpretrain.tracking.metrics_log import MetricsLog
from medpretrain.tracking.replay import sync
from tests.tracking.runs import (
    acknowledged,
    expected,
    free_port,
    hanging_server,
    history,
    make_run,
    run_id,
    start_server,
    stop_server,
    track,
    unreliable_proxy,
    wait_for,
    write,
)

mlflow = pytest.importorskip("mlflow", reason="the train extra brings it")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    process = start_server(tmp_path_factory.mktemp("server"), port)
    yield f"http://127.0.0.1:{port}"
    stop_server(process)


def test_rows_files_and_the_end_arrive_at_a_real_server_once(run, server):
    write(run, range(20))
    tracker = track(run, server)
    write(run, range(20, 1200), other=2.0)
    tracker.close(60)
    write(run, range(1200, 1210))
    track(run, server).close(60)
    assert history(run, server) == expected(range(1210))
    client = mlflow.MlflowClient(server)
    logged = client.get_run(run_id(run, server))
    assert logged.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(logged.info.run_id)] == ["recipe.yaml"]
    synced = sync(run, server)
    assert (synced.rows, synced.points, synced.there) == (1210, 0, 1210 + 1180)
    assert history(run, server) == expected(range(1210))


@pytest.mark.distributed
def test_a_server_killed_in_the_middle_of_a_run_loses_no_point(run, server, tmp_path, caplog):
    port = free_port()
    dying = start_server(tmp_path / "dying", port)
    uri = f"http://127.0.0.1:{port}"
    try:
        write(run, range(50))
        tracker = track(run, uri)
        wait_for(lambda: acknowledged(run, uri) == 49)
    finally:
        stop_server(dying)
    _append_while_away(run, tracker, range(50, 300), caplog)
    assert "250 rows were not sent" in caplog.text
    synced = sync(run, server)
    assert (synced.rows, synced.points, synced.there) == (300, 300, 0)
    assert history(run, server) == expected(range(300))


def test_a_server_that_refuses_holds_nothing_up_and_loses_no_point(run, database, caplog):
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = track(run, uri)
    _append_while_away(run, tracker, range(300), caplog)
    assert "300 rows were not sent" in caplog.text
    assert sync(run, database).points == 300
    assert history(run, database) == expected(range(300))


def test_a_server_that_hangs_holds_nothing_up_and_loses_no_point(run, database, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with hanging_server() as uri:
        tracker = track(run, uri)
        _append_while_away(run, tracker, range(300), caplog)
    assert "300 rows were not sent" in caplog.text
    assert sync(run, database).points == 300
    assert history(run, database) == expected(range(300))


def test_errors_and_lost_acknowledgements_at_random_leave_no_double_and_no_gap(run, server, caplog, monkeypatch):
    monkeypatch.setattr(sender, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(sender, "_LONGEST_WAIT_S", 0.1)
    seed = time.time_ns() % 10_000
    print(f"seed {seed}")
    with unreliable_proxy(server, seed, refused=0.3, unacknowledged=0.3) as (uri, counts):
        tracker = track(run, uri)
        with MetricsLog(run / "metrics.jsonl") as log:
            for step in range(400):
                log.append({"step": step, "loss": 1 / (step + 1)})
                if step == 250:
                    log.truncate_after(step)
                time.sleep(0.003)
        tracker.close(120)
    assert min(counts.values()) > 0
    assert "no metrics reach" in caplog.text
    assert "rows were not sent" not in caplog.text
    client = mlflow.MlflowClient(server)
    points = client.get_metric_history(run_id(run, uri), "loss")
    assert sorted((point.step, point.value) for point in points) == expected(range(400))
    experiment = client.get_experiment_by_name("test")
    found = client.search_runs([experiment.experiment_id], f"tags.`medpretrain.run` = '{_key(client, run, uri)}'")
    assert len(found) == 1


def _key(client, run, uri):
    return client.get_run(run_id(run, uri)).data.tags["medpretrain.run"]


def _append_while_away(run, tracker, steps, caplog):
    """Rows are written and the run ends while the server is away; both in far less than one of MLflow's own waits."""
    started = time.monotonic()
    write(run, steps)
    assert time.monotonic() - started < 10
    wait_for(lambda: "no metrics reach" in caplog.text)
    started = time.monotonic()
    tracker.close(1)
    assert time.monotonic() - started < 10
