"""A run of two hosts under torchrun loses a worker, then a host, then gains one, and ends with what it set out for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from launchers import torchrun
from launchers.head import Head
from launchers.job import Job
from launchers.site import Site
from launchers.torchrun import Nodes
from medpretrain.tracking.metrics_log import read_metrics
from tests.cluster.hosts import Hosts
from tests.faults.running import (
    INJECTED,
    ROOT,
    Runs,
    committed,
    events,
    rows,
    seen,
    steps,
    tensors,
    workers_of,
    write_recipe,
)

pytestmark = pytest.mark.cluster
STEPS = 200
PHASE_S = 150
LR = "optim.lr=1e-6"  # so that rounding does not grow from step to step, and other images would be seen in the losses
TOLERANCE = 1e-3
"""Relative; one process adds in another order than two."""


def agent(host, head, recipe, options, faults):
    """Start one host's part of the run, as `medpretrain launch torchrun` does, on one or two hosts.

    Args:
        head: the host where the rendezvous is.
        faults: a file for tests/faults/injected.py, which stands between torchrun and `medpretrain train`.
    """
    job = Job("run", str(recipe), tuple(options), Path("run"), global_batch=8)
    command = torchrun.train(job, Site(), nodes=Nodes(1, 2), gpus=1, head=Head(head.name, torchrun.PORT))
    words = list(command.words)
    at = words.index("medpretrain") - 1
    words[at : at + 2] = [str(INJECTED), str(faults)]
    return host.start(words, env=command.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"})


class Watched:
    """What becomes of the run in a folder, and how long it takes."""

    def __init__(self, run):
        self.run, self.took = run, {}

    def until(self, happens, agents):
        deadline = time.monotonic() + PHASE_S
        while not happens():
            said = [each.said()[-3000:] for each in agents]
            assert all(each.poll() is None for each in agents), "it ended before: " + "".join(said)
            assert time.monotonic() < deadline, f"starts: {rows(self.run / 'starts.jsonl')}\n" + "".join(said)
            time.sleep(0.05)

    def after(self, name, happens, agents):
        """Until the run has started again, and has committed what it does then."""
        starts, began = rows(self.run / "starts.jsonl"), time.monotonic()
        happens()
        self.until(lambda: len(rows(self.run / "starts.jsonl")) > len(starts), agents)
        start = rows(self.run / "starts.jsonl")[-1]
        self.until(lambda: read_metrics(self.run / "metrics.jsonl")[-1]["time"] > start["time"], agents)
        self.took[name] = round(time.monotonic() - began, 1)
        self.until(lambda: committed(self.run)[-1] > start["step"] + 5, agents)


@pytest.fixture
def whole(tmp_path, small_dataset):
    """An undisturbed run of two processes."""
    folder = tmp_path / "whole"
    folder.mkdir()
    runs = Runs(write_recipe(folder, small_dataset, STEPS), folder)
    try:
        runs.end_well(runs.ranks(f"run.dir={folder / 'run'}", LR))
    finally:
        runs.close()
    return folder / "run"


def test_a_run_goes_on_without_a_lost_host_and_with_its_replacement(whole, small_dataset, tmp_path):
    run, fast, faults = tmp_path / "run", tmp_path / "fast", tmp_path / "faults.json"
    # Slow until told otherwise, so that the run does not end before a host has joined it.
    pace = {"fault": "sleep", "seconds": 0.4, "steps": list(range(STEPS)), "until": str(fast)}
    faults.write_text(json.dumps([pace]))
    # Of a host that is lost nobody hears, not even that its connections are closed: the watchdog finds it out.
    recipe = write_recipe(tmp_path, small_dataset, STEPS)
    how = (recipe, [f"run.dir={run}", LR, "faults.hang_s=10"], faults)
    watched = Watched(run)
    with Hosts(["a", "b"], tmp_path) as (a, b):
        first, second = agent(a, a, *how), agent(b, a, *how)
        watched.until(lambda: bool(committed(run)) and steps(run)[-1] >= 8, [first, second])
        (worker,) = workers_of(second)
        watched.after("a worker is killed", lambda: os.kill(worker, signal.SIGKILL), [first, second])
        watched.after("a host is lost", b.lose, [first])
        b.up()
        joined = []
        watched.after("a host joins", lambda: joined.append(agent(b, a, *how)), [first])
        fast.touch()
        for each in (first, *joined):
            assert each.wait(PHASE_S) == 0, each.said()[-3000:]
    print(f"seconds to the next step: {watched.took}")
    starts = rows(run / "starts.jsonl")
    assert [row["world"] for row in starts] == [2, 2, 1, 2]
    assert_same(run, whole, alone=starts[2]["step"])
    assert events(run, "hang"), "the lost host was not found out by the watchdog"


def assert_same(run: Path, whole: Path, alone: int) -> None:
    """Two runs of the same samples; one of them was of one process from the step `alone`."""
    samples = seen(run, STEPS)
    assert samples == seen(whole, STEPS)
    assert len(samples) == STEPS * 8
    got, wanted = (read_metrics(each / "metrics.jsonl") for each in (run, whole))
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    differences = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(got, wanted, strict=True)]
    assert not any(differences[:alone]), "of two processes, and to the bit"
    assert max(differences) < TOLERANCE
    left, right = tensors(run), tensors(whole)
    assert left.keys() == right.keys()
    far = {name: distance(value, right[name]) for name, value in left.items()}
    print(f"largest difference of a loss {max(differences):.0e}, of a tensor {max(far.values()):.0e}")
    assert not {name: value for name, value in far.items() if value > TOLERANCE}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the larger."""
    norm = max(a.double().norm().item(), b.double().norm().item())
    return (a.double() - b.double()).norm().item() / norm if norm else 0.0
