"""A shipped recipe on real hosts, as users launch it, while workers, hosts and queues do their worst.

    sudo PYTHONPATH=. python benchmarks/cluster.py IMAGES [--labels mednist] [--steps 160] [--out benchmarks/results]

Hosts are network namespaces of this machine, with SLURM's own programs (tests/cluster/packages.txt). IMAGES are
prepared by an array of four parts. `medpretrain launch slurm`, its preflight first, is pre-empted, then loses a node;
`medpretrain launch torchrun ... --nodes 1:2` loses a worker (SIGKILL), then a host without a word, and gains one. Both
must end by themselves, with the samples and augmentations of an undisturbed run of two hosts, and with its tensors: to
the bit where two processes did all, but for rounding where one did some. About half an hour, so it is run by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import torch

from medpretrain.tracking.metrics_log import read_metrics
from tests.cluster.hosts import Host, Hosts, Process
from tests.cluster.slurm import Slurm
from tests.faults.running import ROOT, committed, events, rows, seen, steps, tensors

RECIPE = "modan_mulsupcon_small"
MEDPRETRAIN = (sys.executable, "-m", "medpretrain")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
EVERY = 20
PATIENCE_S = 900


def train(data: Path, run: Path, steps_: int) -> list[str | Path]:
    """The words after `medpretrain train` or `launch ...`."""
    words = [f"data.path={data}", f"run.dir={run}", f"train.steps={steps_}", f"checkpoint.every={EVERY}"]
    words += ["data.trace=true", "device=cpu", "train.threads=1", "data.threads=1", "train.deterministic=true"]
    return [RECIPE, *words, "train.log_every=1", "checkpoint.keep=99", "faults.hang_s=20", "tracking.uri=none"]


def until(happens: Callable[[], bool], *processes: Process) -> float:
    """Seconds until something happens while the processes go on."""
    began = time.monotonic()
    while not happens():
        for one in processes:
            if one.poll() is not None:
                raise RuntimeError(f"it ended before:\n{one.said()[-3000:]}")
        if time.monotonic() - began > PATIENCE_S:
            raise RuntimeError("".join(one.said()[-3000:] for one in processes))
        time.sleep(0.1)
    return time.monotonic() - began


def next_step(run: Path, what: Callable[[], object], *processes: Process) -> float:
    """Seconds from an event to the next step that is trained by a start after it."""
    starts, began = len(rows(run / "starts.jsonl")), time.monotonic()
    what()
    until(lambda: len(rows(run / "starts.jsonl")) > starts, *processes)
    at = rows(run / "starts.jsonl")[-1]["time"]
    until(lambda: read_metrics(run / "metrics.jsonl")[-1]["time"] > at, *processes)
    return round(time.monotonic() - began, 1)


def prepare(slurm: Slurm, images: Path, labels: str, folder: Path, site: Path) -> dict[str, Any]:
    words = [images, "--labels", labels, "--split", "train=0.8,val=0.1,test=0.1", "--shard-size", "500"]
    launch = [*MEDPRETRAIN, "launch", "prep", "slurm", "--parts", "4", "--site", site]
    done = slurm.run(*launch, "images", *words, "parts", cwd=folder, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    done = slurm.run(*MEDPRETRAIN, "prep", "images", *words, "single", cwd=folder, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    hashes = [
        {
            str(file.relative_to(folder / name)): file.read_bytes()
            for file in (folder / name).rglob("*")
            if file.is_file()
        }
        for name in ("parts", "single")
    ]
    assert hashes[0] == hashes[1], "an array gives other bytes than one process"
    return {"files": len(hashes[0]), "bytes": "those of one process"}


def undisturbed(hosts: Hosts, data: Path, run: Path, total: int) -> None:
    ranks = []
    for rank, name in enumerate(("a", "b")):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29600"}
        ranks.append(hosts[name].start([*MEDPRETRAIN, "train", *train(data, run, total)], env=ENVIRONMENT | place))
    for rank in ranks:
        assert rank.wait(PATIENCE_S) == 0, rank.said()[-3000:]


def under_torchrun(hosts: Hosts, data: Path, run: Path, total: int) -> dict[str, Any]:
    took = {}

    def agent(host: Host) -> Process:
        launch = [*MEDPRETRAIN, "launch", "torchrun", *train(data, run, total)]
        return host.start([*launch, "--nodes", "1:2", "--gpus", "1", "--head", "a"], env=ENVIRONMENT, cwd=run.parent)

    a, b = hosts["a"], hosts["b"]
    first, second = agent(a), agent(b)
    # torchrun starts with whoever is there: the run is of two hosts once both have come.
    until(lambda: bool(started := rows(run / "starts.jsonl")) and started[-1]["world"] == 2, first, second)
    until(lambda: bool(committed(run)) and steps(run)[-1] > committed(run)[-1] + 3, first, second)
    children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    (worker,) = [pid for pid in children if b"medpretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    took["a worker is killed"] = next_step(run, lambda: os.kill(int(worker), signal.SIGKILL), first, second)
    until(lambda: steps(run)[-1] > rows(run / "starts.jsonl")[-1]["step"] + EVERY + 3, first, second)
    took["a host is lost"] = next_step(run, b.lose, first)
    until(lambda: steps(run)[-1] > rows(run / "starts.jsonl")[-1]["step"] + EVERY + 3, first)
    b.up()
    joined: list[Process] = []
    took["a host joins"] = next_step(run, lambda: joined.append(agent(b)), first)
    for one in (first, *joined):
        assert one.wait(PATIENCE_S) == 0, one.said()[-3000:]
    return {"seconds to the next step": took}


def under_slurm(slurm: Slurm, hosts: Hosts, data: Path, run: Path, total: int, site: Path) -> dict[str, Any]:
    launch = [*MEDPRETRAIN, "launch", "slurm", *train(data, run, total), "--nodes", "2", "--site", site]
    watcher = hosts["login"].start(launch, env=slurm.environment | ENVIRONMENT, cwd=run.parent)
    until(lambda: bool(committed(run)) and steps(run)[-1] > committed(run)[-1] + 3, watcher)
    took = {}

    def preempt() -> None:
        words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        slurm.wait(slurm.submit(*words), "COMPLETED", timeout=PATIENCE_S)

    took["pre-empted, requeued"] = next_step(run, preempt, watcher)
    (left,) = events(run, "preempted")
    assert committed(run)[-1] >= left["step"], "a pre-emption has lost steps"
    until(lambda: steps(run)[-1] > left["step"] + EVERY + 3, watcher)

    def lose_node() -> None:
        hosts["b"].lose()
        until(lambda: slurm.node_states()["b"].startswith("down"), watcher)
        hosts["b"].up()
        slurm.start_node(hosts["b"])

    took["a node dies, comes back"] = next_step(run, lose_node, watcher)
    assert watcher.wait(PATIENCE_S) == 0, watcher.said()[-3000:]
    assert "preflight of 2 hosts: " in watcher.said()
    return {"seconds to the next step": took}


def compared(run: Path, whole: Path, total: int) -> dict[str, Any]:
    assert steps(run) == list(range(1, total + 1)), "a step is missing, or there twice"
    assert seen(run, total) == seen(whole, total), "other samples or augmentations"
    found, expected = tensors(run), tensors(whole)
    assert found.keys() == expected.keys()
    losses = [[row["loss"] for row in read_metrics(one / "metrics.jsonl")] for one in (run, whole)]
    starts = [{key: row[key] for key in ("step", "world")} for row in rows(run / "starts.jsonl")]
    return {
        "starts": starts,
        "tensors that differ": sum(not torch.equal(found[name], expected[name]) for name in found),
        "largest relative difference of a loss": max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)),
        "samples and augmentations": "those of the undisturbed run",
    }


def markdown(about: str, found: dict[str, Any]) -> str:
    lines = [
        f"# A shipped recipe on two hosts\n\n{about}\n",
        "| what happened | seconds to the next step |",
        "| --- | ---: |",
    ]
    for name in ("torchrun", "slurm"):
        lines += [f"| {name}: {what} | {took} |" for what, took in found[name]["seconds to the next step"].items()]
    lines += [
        "",
        "| | starts (step, processes) | tensors that differ | largest difference of a loss |",
        "| --- | --- | ---: | ---: |",
    ]
    for name in ("torchrun", "slurm"):
        one = found[name]
        starts = ", ".join(f"{row['step']} ({row['world']})" for row in one["starts"])
        worst = one["largest relative difference of a loss"]
        lines.append(f"| {name} | {starts} | {one['tensors that differ']} | {worst:.1e} |")
    lines.append("\nEvery step was trained once, with the samples and augmentations of the undisturbed run.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--labels", default="mednist")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="cluster-") as temporary:
        folder = Path(temporary)
        site = folder / "site.yaml"
        lines = ("gpus: 1", f"environment: {{PYTHONPATH: {ROOT}}}", "slurm: {gpu_option: none, signal_s: 30}")
        site.write_text("".join(f"{line}\n" for line in lines))
        with Hosts(["login", "a", "b"], folder) as hosts:
            slurm = Slurm(hosts, folder / "slurm", controller="login", grace=60)
            found["prepared"] = prepare(slurm, given.images.absolute(), given.labels, folder, site)
            data = folder / "parts"
            undisturbed(hosts, data, folder / "whole", given.steps)
            runs = {"torchrun": folder / "torchrun", "slurm": folder / "by-slurm"}
            found["slurm"] = under_slurm(slurm, hosts, data, runs["slurm"], given.steps, site)
            found["torchrun"] = under_torchrun(hosts, data, runs["torchrun"], given.steps)
            for name, run in runs.items():
                found[name] |= compared(run, folder / "whole", given.steps)
    command = f"PYTHONPATH=. python benchmarks/cluster.py {given.images.name} --steps {given.steps}"
    about = (
        f"`{command}`: {RECIPE}, a checkpoint every {EVERY} steps; {jobs.machine().replace(' on loopback', '')}; "
        f"SLURM starts a requeued job after 15 s; {time.monotonic() - began:.0f} s in all."
    )
    print(text := markdown(about, found))
    if given.out:
        jobs.write_by_rename(given.out / "cluster.md", text)
        jobs.write_by_rename(given.out / "cluster.json", json.dumps({"about": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
