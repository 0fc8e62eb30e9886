"""How many bytes a step sends, and how long that takes, against the model in medpretrain/training/communication.py.

    sudo python benchmarks/weak_scaling.py [--worlds 2 3 4] [--rates 200 400 800] [--out benchmarks/results]

Every run is `medpretrain train` as users start it, gloo on CPU, with the same images a process whatever their number.
Each rank has a network namespace of its own, joined to the others by a switch: so the kernel counts what each sends
(headers and acknowledgements too, at packets of up to 64 KiB), and `tc` can make its link as slow as is wanted. Needs
root, and touches no interface of the machine.

Bytes are those between the rows of two steps. Times are those of the rows too; each process has one core to itself, or
shares it where there are more processes than cores, so a slow link is what lets a step of several be predicted here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jobs
from warm import Started

from medpretrain.tracking.metrics_log import read_metrics

IMAGES = 8
"""Of each process."""
FROM, STEPS = 3, 6
"""Steps left out at the start, and steps counted."""
PATIENCE_S = 180.0
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_VIEWS = "{crop: {size: 32, count: 2, crop: [0.4, 1], flip: 0.5}}"
METHODS = {
    "dino": (
        "vit_tiny_patch16_224",
        "{global: {size: 32, count: 2, crop: [0.4, 1]}, local: {size: 16, count: 2, crop: [0.1, 0.4]}}",
        "{name: dino, prototypes: 4096, hidden: 512, bottleneck: 128}",
        "",
    ),
    "simclr": ("resnet18", _VIEWS, "{name: simclr, projector: [512, 128]}", ""),
    "supervised": ("resnet18", "{crop: {size: 32, crop: [0.4, 1]}}", "{name: supervised}", "modality"),
}
"""Backbone, views, method and labels."""
STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp2"} | {f"zero{stage}": "deepspeed" for stage in (1, 2)}
COUNTED = {
    "dino": ("ddp", "fsdp2", "zero2", "zero1"),
    "simclr": ("ddp", "fsdp2"),
    "supervised": ("ddp", "zero2"),
}
"""Of which bytes are counted; of stage 1 with the most processes alone."""
TIMED = ("ddp", "fsdp2", "zero2")
"""Under which DINO is timed on slow links; all but DDP at the highest rate alone, with the fewest and the most
processes."""
_RECIPE = """\
name: scaling
data: {{path: {dataset}, channels: 1, labels: [{labels}], threads: 1}}
backbone: {{name: {backbone}}}
views: {views}
method: {method}
strategy: {strategy}
optim: {{name: adamw, lr: 1.0e-4, clip: 3.0}}
train: {{steps: 100, global_batch: {batch}, zero_stage: {stage}, threads: 1, log_every: {every}}}
checkpoint: {{every: 1000}}
tracking: {{uri: none}}
device: cpu
"""


class Hosts:
    """A network namespace a rank, 10.9.8.1 for the first, and a switch between them; gone at the end.

    Args:
        rate: megabits a second that each may send; None: as fast as the machine copies.

    Raises:
        SystemExit: not root.
    """

    def __init__(self, world: int, rate: int | None = None) -> None:
        if os.geteuid() != 0:
            sys.exit("network namespaces need root: sudo python benchmarks/weak_scaling.py ...")
        self._world, self._rate = world, rate
        self._switch = f"scaling{os.getpid()}-switch"
        self.names = [f"scaling{os.getpid()}-{rank}" for rank in range(world)]
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            for name in (self._switch, *self.names):
                _run("ip", "netns", "add", name)
                self._made.append(name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", self._switch, "link", "add", "bridge", "mtu", "65535", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for rank, name in enumerate(self.names):
                port = f"port{rank}"
                peer = ("peer", "name", "eth0", "netns", name, "mtu", "65535")
                _run("ip", "-n", self._switch, "link", "add", port, "mtu", "65535", "type", "veth", *peer)
                _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
                _run("ip", "-n", name, "addr", "add", f"10.9.8.{rank + 1}/24", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "up")
                if self._rate is not None:
                    shaped = ("tbf", "rate", f"{self._rate}mbit", "burst", "131072", "limit", "16777216")
                    _run("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", *shaped)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        self._made.clear()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


def _enter(namespace: str) -> None:
    """What this thread, and those it starts, sees of the network from now on."""
    with (_NAMESPACES / namespace).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def sent(pid: int) -> int:
    """Bytes that went over the link of the namespace of a process."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == "eth0":
            return int(columns.split()[8])
    raise RuntimeError(f"process {pid} has no eth0")


@dataclass(frozen=True)
class Counted:
    """What a run came to.

    Attributes:
        bytes: sent in a step, by each rank.
        seconds: of a step.
    """

    bytes: list[float]
    seconds: float


def count(recipe: Path, folder: Path, world: int, rate: int | None = None) -> Counted:
    """Start a run, look at it between two of its rows, and end it."""
    run = folder / f"run-{time.monotonic_ns()}"
    common = {"MASTER_ADDR": "10.9.8.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    # Each is the only process of its host, as torchrun would tell it.
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with Hosts(world, rate) as hosts, ExitStack() as stack:
        ranks = []
        for rank, name in enumerate(hosts.names):
            arguments = ["--rank-in", name, str(rank), "train", str(recipe), f"run.dir={run}"]
            arguments.append(f"train.global_batch={IMAGES * world}")
            log = folder / f"{run.name}.rank{rank}.log"
            started = Started(arguments, os.environ | common | {"RANK": str(rank)}, log, Path(__file__).resolve())
            ranks.append(started)
            stack.callback(started.wait)
            stack.callback(started.kill_group)
        pids = [one.pid for one in ranks]
        seen = []
        deadline = time.monotonic() + PATIENCE_S
        for row in (FROM, FROM + STEPS):
            while not (run / "metrics.jsonl").exists() or jobs.last_step(run) < row:
                if any(one.poll() is not None for one in ranks) or time.monotonic() > deadline:
                    logs = sorted(folder.glob(f"{run.name}.rank*.log"))
                    raise RuntimeError("\n".join(log.read_text(errors="replace")[-1500:] for log in logs))
                time.sleep(0.001)
            seen.append([sent(pid) for pid in pids] if world > 1 else [0])
    at = {row["step"]: row["time"] for row in read_metrics(run / "metrics.jsonl")}
    return Counted(
        [(after - before) / STEPS for before, after in zip(*seen, strict=True)], (at[FROM + STEPS] - at[FROM]) / STEPS
    )


def write_recipe(folder: Path, dataset: Path, method: str, strategy: str) -> Path:
    backbone, views, options, labels = METHODS[method]
    path = folder / f"{method}-{strategy}.yaml"
    path.write_text(
        _RECIPE.format(
            dataset=dataset,
            labels=labels,
            backbone=backbone,
            views=views,
            method=options,
            strategy=STRATEGIES[strategy],
            stage=strategy[-1] if strategy.startswith("zero") else 2,
            batch=IMAGES,
            every=FROM,
        )
    )
    return path


def bytes_row(method: str, strategy: str, recipe: Path, folder: Path, world: int) -> dict[str, Any]:
    """Counted bytes of a rank beside the theoretical minimum, and what the model says."""
    from scaling_model import least_bytes, shapes, step_bytes

    from medpretrain.recipe_file import load_recipe

    found = count(recipe, folder, world)
    loaded = load_recipe(str(recipe))
    step = shapes(loaded, IMAGES).exchanges(
        world, strategy=STRATEGIES[strategy], zero_stage=loaded.train.zero_stage, gloo=True
    )
    mean, least, model = sum(found.bytes) / world, least_bytes(step, world), step_bytes(step, world)
    return {
        "method": method,
        "strategy": strategy,
        "processes": world,
        "counted": mean,
        "most_of_a_rank": max(found.bytes),
        "least": least,
        "model": model,
        "above_least": mean / least - 1,
        "off_model": mean / model - 1,
        "seconds": found.seconds,
    }


def time_rows(
    method: str, strategy: str, recipe: Path, folder: Path, worlds: list[int], rates: list[int], alone_s: float
) -> list[dict[str, Any]]:
    """Measured seconds of a step on slow links beside those of the model."""
    from scaling_model import shapes, step_seconds

    from medpretrain.recipe_file import load_recipe
    from medpretrain.training.communication import Cluster

    loaded, rows = load_recipe(str(recipe)), []
    found = shapes(loaded, IMAGES)
    for world in worlds:
        step = found.exchanges(world, strategy=STRATEGIES[strategy], zero_stage=loaded.train.zero_stage, gloo=True)
        compute_s = alone_s * -(-world // len(os.sched_getaffinity(0)))
        for rate in rates:
            link = Cluster(world, 1, within=float("inf"), between=rate * 1e6 / 8)
            model = step_seconds(step, link, compute_s / 3, compute_s * 2 / 3, overlap=strategy == "ddp", gloo=True)
            measured = count(recipe, folder, world, rate).seconds
            row = {
                "method": method, "strategy": strategy, "processes": world, "mbit_s": rate, "compute_s": compute_s,
                "model_s": model, "measured_s": measured, "off_model": measured / model - 1,
            }  # fmt: skip
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    return rows


def markdown(counted: list[dict[str, Any]], timed: list[dict[str, Any]], about: str) -> str:
    lines = [
        f"# Weak scaling\n\n{about}\n",
        "Megabytes that a rank sends in a step, headers and acknowledgements included. `least` is what the best "
        "algorithm would send, `model` what this strategy is expected to.\n",
        "| method | strategy | processes | counted | least | above least | model | off the model |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in counted:
        cells = [f"`{row['method']}`", row["strategy"], str(row["processes"]), f"{row['counted'] / 1e6:.2f}"]
        cells += [f"{row['least'] / 1e6:.2f}", f"{row['above_least']:+.1%}", f"{row['model'] / 1e6:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['off_model']:+.1%}"]) + " |")
    lines += [
        "\nSeconds of a step on slow links.\n",
        "| method | strategy | processes | Mbit/s | compute, s | model, s | measured, s | off the model |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in timed:
        cells = [f"`{row['method']}`", row["strategy"], str(row["processes"]), str(row["mbit_s"])]
        cells += [f"{row[name]:.3f}" for name in ("compute_s", "model_s", "measured_s")]
        lines.append("| " + " | ".join([*cells, f"{row['off_model']:+.1%}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--rank-in"]:
        _, _, namespace, rank, *arguments = sys.argv
        _enter(namespace)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(rank) % len(cores)]})
        from medpretrain.cli import main as medpretrain

        sys.argv = ["medpretrain", *arguments]
        medpretrain()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--rates", nargs="*", type=int, default=[200, 400, 800], help="Mbit/s")
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # namespaces and ranks go with it
    began = time.monotonic()
    counted, timed = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = jobs.make_dataset(folder)
        for method in given.methods:
            for strategy in COUNTED[method]:
                if strategy in given.strategies:
                    recipe = write_recipe(folder, dataset, method, strategy)
                    for world in given.worlds[-1:] if strategy == "zero1" else given.worlds:
                        counted.append(bytes_row(method, strategy, recipe, folder, world))
                        print(json.dumps(counted[-1]), file=sys.stderr)
        if given.rates:
            alone_s = count(write_recipe(folder, dataset, "dino", "ddp"), folder, 1).seconds
            for strategy in [one for one in TIMED if one in given.strategies]:
                recipe = write_recipe(folder, dataset, "dino", strategy)
                full = strategy == "ddp"
                worlds = given.worlds if full else sorted({given.worlds[0], given.worlds[-1]})
                rates = given.rates if full else given.rates[-1:]
                timed += time_rows("dino", strategy, recipe, folder, worlds, rates, alone_s)
    command = " ".join(["python benchmarks/weak_scaling.py", *sys.argv[1:]])
    took = f"load of the machine {os.getloadavg()[1]:.1f}, {time.monotonic() - began:.0f} s"
    about = (
        f"`{command}`, {jobs.machine().replace(' on loopback', '')}, a network namespace a rank; {IMAGES} images a "
        f"process, {STEPS} steps counted; {took}."
    )
    print(text := markdown(counted, timed, about))
    if given.out:
        jobs.write_by_rename(given.out / "weak_scaling.md", text)
        data = {"about": about, "bytes": counted, "times": timed}
        jobs.write_by_rename(given.out / "weak_scaling.json", json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
