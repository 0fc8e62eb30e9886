"""A tracking server that refuses, hangs or dies for a whole real run: training ends well, and no point is lost."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from medpretrain import cli
from medpretrain.tracking import session
from tests.faults.running import reached, read_metrics
from tests.tracking.runs import acknowledged, free_port, hanging_server, history, start_server, stop_server

pytest.importorskip("mlflow", reason="the train extra brings it")
pytestmark = pytest.mark.distributed
STEPS, PAUSE = 30, 20


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Sync fills in MLflow's variables for this process; undo that after each test."""
    for name in [*session.ENVIRONMENT, "MLFLOW_TRACKING_URI"]:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def test_a_server_that_refuses_hangs_or_dies_costs_neither_a_step_nor_a_point(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    port = free_port()
    dying = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path / "server", port)
    try:
        with hanging_server() as hanging:
            uris = {"refuses": f"http://127.0.0.1:{free_port()}", "hangs": hanging, "dies": dying}
            gone = tmp_path / "gone"
            held = [{"fault": "wait", "steps": [PAUSE], "for": str(gone)}]
            # At once, for each waits half a minute for its server at the end.
            started = {
                name: runs.ranks(f"run.dir={tmp_path / name}", f"tracking.uri={uri}", world=1, faults=held)[0]
                for name, uri in uris.items()
            }
            for name, process in started.items():
                runs.wait(reached(tmp_path / name, PAUSE), [process])
            runs.wait(lambda: acknowledged(tmp_path / "dies", dying) == PAUSE, list(started.values()))
            stop_server(server)
            gone.touch()
            runs.end_well(list(started.values()))
    finally:
        stop_server(server)

    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for name, process in started.items():
        run, unsent = tmp_path / name, STEPS - PAUSE if name == "dies" else STEPS
        assert f"{unsent} rows were not sent to MLflow at {uris[name]}" in runs.said(process)
        assert runs.said(process).count("no metrics reach MLflow") == 1
        rows = read_metrics(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        monkeypatch.setattr(sys, "argv", ["medpretrain", "sync", str(run), "--uri", database])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        assert f"{STEPS} rows, " in capsys.readouterr().out
        for key in ("loss", "lr", "images_per_s", "system/memory_gib"):
            assert history(run, database, key) == [(row["step"], row[key]) for row in rows]
        assert json.loads((run / "tracking" / "run.json").read_text())["status"] == "FINISHED"


def test_a_run_asked_to_leave_is_killed_and_not_failed_to_its_tracker_also_where_that_hangs(runs, tmp_path):
    run = tmp_path / "run"
    with hanging_server() as uri:
        faults = [{"fault": "sleep", "seconds": 0.05}]
        arguments = (f"run.dir={run}", f"tracking.uri={uri}", "train.steps=10000")
        (rank,) = runs.ranks(*arguments, world=1, faults=faults)
        runs.wait(reached(run, 6), [rank])
        rank.send_signal(signal.SIGTERM)
        assert runs.end([rank]) == [75]
    assert "the checkpoint is committed" in runs.last_line(rank)
    assert not list(run.glob("curves*")), "no time for them"
    assert json.loads(Path(run / "tracking" / "run.json").read_text())["status"] == "KILLED"
