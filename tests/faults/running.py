"""Real `medpretrain train` processes on a tiny recipe, started, waited for and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from warm import Started

from medpretrain.checkpoints import newest, open_target, read
from medpretrain.tracking.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
INJECTED = Path(__file__).parent / "injected.py"
DEADLINE_S = 240
RECIPE = """\
name: faults
data: {{path: {dataset}, channels: 1, labels: [class], trace: true, threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, crop: [0.4, 1], flip: 0.5}}}}
method: {{name: supervised}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: {steps}, global_batch: 8, deterministic: true, threads: 1, log_every: 1}}
checkpoint: {{every: 5, keep: 99}}
device: cpu
tracking: {{uri: none}}
"""


def write_recipe(folder, dataset, steps):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(dataset=dataset, steps=steps))
    return path


class Runs:
    """The processes of a test, all ended with it; each is a session and a process group of its own.

    Args:
        recipe: the recipe all of them train.
        folder: for what they write to standard error.
    """

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.processes: list[subprocess.Popen] = []
        self._logs: dict[int, Path] = {}

    def ranks(self, *arguments, world=2, faults=None):
        """Start `medpretrain train RECIPE *arguments` as each rank of a group on loopback."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return [
            self._warm(self._train(arguments, faults), place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]

    def torchrun(self, *arguments, flags=(), faults=None):
        """Start it under torchrun."""
        command = [sys.executable, "-m", "torch.distributed.run", *flags, *self._train(arguments, faults)]
        # With the agent's store shared with the ranks, torch 2.15's restarted workers wait for each other for ever.
        return self._open(command, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def _train(self, arguments, faults):
        train = ["train", str(self.recipe), *map(str, arguments)]
        if faults is None:
            return ["-m", "medpretrain", *train]
        injected = self.folder / f"faults{len(self.processes)}.json"
        injected.write_text(json.dumps(faults))
        return [str(INJECTED), str(injected), *train]

    def _warm(self, words, environment):
        """Start `python *words` without its imports."""
        script = None if words[0] == "-m" else Path(words[0])
        log = self._next_log()
        return self._keep(
            Started(words[2 if script is None else 1 :], self._environment(environment), log, script), log
        )

    def _open(self, command, environment):
        log = self._next_log()
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, env=self._environment(environment), stdout=said, stderr=said, start_new_session=True
            )
        return self._keep(process, log)

    def _environment(self, more):
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
        return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "1000"} | more

    def _next_log(self):
        return self.folder / f"process{len(self.processes)}.log"

    def _keep(self, process, log):
        self.processes.append(process)
        self._logs[process.pid] = log
        return process

    def said(self, process):
        return self._logs[process.pid].read_text(errors="replace")

    def last_line(self, process):
        return (self.said(process).strip().splitlines() or [""])[-1]

    def end(self, processes, timeout=DEADLINE_S):
        """Their exit codes."""
        deadline = time.monotonic() + timeout
        for process in processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError("it does not end: " + self.said(process)[-3000:]) from None
        return [process.returncode for process in processes]

    def end_well(self, processes):
        codes = self.end(processes)
        assert codes == [0] * len(processes), "".join(self.said(process)[-3000:] for process in processes)

    def wait(self, happens, processes, timeout=DEADLINE_S):
        """Until something happens, while the processes go on."""
        deadline = time.monotonic() + timeout
        while not happens():
            ended = [process for process in processes if process.poll() is not None]
            assert not ended, "it ended before: " + self.said(ended[0])[-3000:]
            assert time.monotonic() < deadline, "".join(self.said(process)[-3000:] for process in processes)
            time.sleep(0.02)

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def workers_of(agent):
    """PIDs of an agent's workers."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(child) for child in children if b"injected.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps(run):
    """Of the rows of metrics, in the order of the file."""
    file = run / "metrics.jsonl"
    return [row["step"] for row in read_metrics(file)] if file.exists() else []


def reached(run, step):
    return lambda: bool(steps(run)) and steps(run)[-1] >= step


def committed(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def events(run, kind):
    return [row for row in rows(run / "events.jsonl") if row["event"] == kind]


def seen(run, total):
    """(step, epoch, sample) -> digest of the augmentation, the last time each was delivered."""
    found = {}
    for path in run.glob("samples-rank*.jsonl"):
        for row in rows(path):
            for epoch, sample, digest in zip(row["epoch"], row["sample"], row["parameters"], strict=True):
                found[row["step"], epoch, sample] = digest
    return {place: digest for place, digest in found.items() if place[0] < total}


def tensors(run):
    """Of the last checkpoint."""
    found = newest(open_target(None, run))
    assert found is not None
    return read(found)


def assert_identical(one, other):
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
