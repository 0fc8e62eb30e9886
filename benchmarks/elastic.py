"""Lose a worker, then a host, then gain one, under torchrun with two agents; and compare with an undisturbed run.

    python -m benchmarks.elastic [--out benchmarks/results]

Two agents on loopback stand for two hosts, each with one process of a run. A worker is killed with SIGKILL: both come
back. Then one agent and its worker are killed, the one that does not hold the rendezvous: the other goes on alone. Then
a new agent joins. The run must end by itself with the samples and augmentations of an undisturbed run of two processes,
and with its losses but for rounding: alone, a process adds in another order. Takes about two minutes, so it is run by
hand. Measured is the time from each event to the next step that is trained.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_prep.images import prepare
from data_prep.synthetic import make_demo_images
from medpretrain.tracking.metrics_log import read_metrics
from tests.faults.running import Runs, committed, free_port, rows, seen, steps, workers_of, write_recipe

STEPS = 300
LR = "optim.lr=1e-6"  # so that rounding does not grow from step to step, and other images would be seen in the losses
PACE = [{"fault": "sleep", "seconds": 0.1}]
CONF = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastic-") as scratch:
        folder = Path(scratch)
        make_demo_images(folder / "made", per_class=10, seed=0)
        prepare(folder / "made" / "images", folder / "shards", split={"train": 1.0}, shard_size=20)
        runs = Runs(write_recipe(folder, folder / "shards", STEPS), folder)
        try:
            runs.end_well(runs.ranks(f"run.dir={folder / 'whole'}", LR))
            took = disturbed(runs, folder / "run")
        finally:
            runs.close()
        run, whole = folder / "run", folder / "whole"
        got, wanted = (read_metrics(each / "metrics.jsonl") for each in (run, whole))
        assert [row["step"] for row in got] == list(range(1, STEPS + 1))
        assert seen(run, STEPS) == seen(whole, STEPS), "other samples or augmentations"
        differences = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(got, wanted, strict=True)]
        starts = [{key: row[key] for key in ("step", "world", "restart")} for row in rows(run / "starts.jsonl")]
        assert [row["world"] for row in starts] == [2, 2, 1, 2], starts
        alone = starts[2]["step"]
        assert not any(differences[:alone]), "of two processes, and to the bit"
        assert max(differences) < TOLERANCE, max(differences)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "steps": STEPS,
        "samples": "as in the undisturbed run",
        "largest_relative_difference_of_loss": max(differences),
        "the_same_to_the_bit_up_to_step": alone,
        "starts": starts,
        "seconds_to_the_next_step": took,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "elastic.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def disturbed(runs: Runs, run: Path) -> dict[str, float]:
    port, took = free_port(), {}

    def agent(host: bool) -> subprocess.Popen:
        flags = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=elastic", "--rdzv-backend=c10d")
        place = (
            f"--rdzv-endpoint=127.0.0.1:{port}",
            f"--rdzv-conf={CONF},is_host={int(host)}",
            "--local-addr=127.0.0.1",
        )
        return runs.torchrun(f"run.dir={run}", LR, flags=(*flags, *place), faults=PACE)

    def after(name: str, happens: Callable[[], object], alive: list) -> None:
        starts, began = len(rows(run / "starts.jsonl")), time.monotonic()
        happens()
        runs.wait(lambda: len(rows(run / "starts.jsonl")) > starts, alive)
        start = rows(run / "starts.jsonl")[-1]
        first = start["step"] + 1
        runs.wait(lambda: read_metrics(run / "metrics.jsonl")[-1]["time"] > start["time"], alive)
        took[name] = round(time.monotonic() - began, 1)
        print(name, took[name], flush=True)
        runs.wait(lambda: committed(run)[-1] >= first + 5, alive)

    first, second = agent(host=True), agent(host=False)
    runs.wait(lambda: bool(committed(run)) and steps(run)[-1] >= 8, [first, second])
    after("a worker is killed", lambda: os.kill(workers_of(second)[0], signal.SIGKILL), [first, second])

    def lose_host() -> None:
        for pid in (second.pid, *workers_of(second)):
            os.kill(pid, signal.SIGKILL)

    after("a host is lost", lose_host, [first])
    joined = []
    after("a host joins", lambda: joined.append(agent(host=False)), [first])
    runs.end_well([first, *joined])
    return took


if __name__ == "__main__":
    main()
