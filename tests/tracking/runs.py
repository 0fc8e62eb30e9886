"""Runs, servers that work and servers that do not, for the tests of tracking."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from medpretrain.recipe_file import dump_recipe, load_recipe
from medpretrain.tracking.metrics_log import MetricsLog
from medpretrain.tracking.sender import Tracker
from medpretrain.tracking.state import server_file

LONG = "x" * 12_500


def track(run, uri, **changes):
    arguments = {
        "experiment": "test",
        "run_name": "short",
        "params": {"lr": "0.1", "recipe": LONG},
        "artifacts": [run / "recipe.yaml"],
        "interval_s": 0.05,
    }
    return Tracker(run, uri, **(arguments | changes))


def write(run, steps, value=lambda step: 1 / (step + 1), **more):
    with MetricsLog(run / "metrics.jsonl") as log:
        for step in steps:
            log.append({"step": step, "loss": value(step), **more})


def expected(steps):
    return [(step, 1 / (step + 1)) for step in steps]


def make_run(folder, **changes):
    """A run folder with a recipe and no metrics yet."""
    folder.mkdir(parents=True)
    recipe = load_recipe("simclr", [f"{key}={value}" for key, value in changes.items()])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def wait_for(happens, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def acknowledged(run, uri):
    """The step of the last row that a server has acknowledged."""
    file = server_file(run.resolve(), uri)
    return json.loads(file.read_text())["step"] if file.exists() else -1


def run_id(run, uri):
    return json.loads(server_file(run.resolve(), uri).read_text())["run_id"]


def history(run, uri, key="loss"):
    """The points that a server has, by step and value; the same point twice would be there twice."""
    from mlflow import MlflowClient

    points = MlflowClient(uri).get_metric_history(run_id(run, uri), key)
    return sorted((point.step, point.value) for point in points)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """A real MLflow server on loopback, with a database of its own; returns when it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # five more processes, for language models
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return server
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                stop_server(server)
                raise AssertionError((folder / "server.log").read_text()) from None
            time.sleep(0.1)


def stop_server(server: subprocess.Popen) -> None:
    """Kill the server and its workers, as a power cut would."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


@contextmanager
def hanging_server():
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def unreliable_proxy(target: str, seed: int, refused: float, unacknowledged: float):
    """In front of a server: answers some requests with 500, passes others on and drops the answer."""
    draw, lock = random.Random(seed), threading.Lock()
    counts = {"refused": 0, "unacknowledged": 0}

    class Proxy(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                fate = draw.random()
            if fate < refused:
                counts["refused"] += 1
                self.send_error(500)
                return
            passed = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
            request = urllib.request.Request(target + self.path, data=body or None, headers=passed, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=20) as response:
                    status, headers, answer = response.status, response.headers, response.read()
            except urllib.error.HTTPError as error:
                status, headers, answer = error.code, error.headers, error.read()
            if fate < refused + unacknowledged:
                counts["unacknowledged"] += 1
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            self.send_header("Content-Type", headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counts
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
