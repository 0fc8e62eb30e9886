"""What a run costs beside a bare loop with the same model and loss.

    python benchmarks/overhead.py [--ranks 1 2] [--rounds 20] [--out benchmarks/results]

Both loops train on the same batches, which lie in memory, in one process (or one pair of them), in turns: a round is
some steps of one, the same of the other, then the other way round. The bare loop is forward, loss, backward, optimizer
and the method's own update, and nothing else. Ours is `Steps.once` with all that a run has: the look at the gradient's
norm, schedules, agreement on signals, watchdog and probe, metrics every 10 steps with the measures of collapse, and
with `saves` a checkpoint in the background in every round, far more often than in a real run, which gives what one save
costs. The figure is the median over rounds of the ratio of their times, with a 95 % interval from 2,000
resamplings of the rounds (seed 0).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from medpretrain.checkpoints import CheckpointInfo, Saver, open_target
from medpretrain.data.batches import Batch
from medpretrain.health.preemption import Preemption
from medpretrain.health.watchdog import Watchdog
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.models.batchnorm import use_global_batchnorm
from medpretrain.recipe import Checkpoint, Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process, joined
from medpretrain.training.reporting import reporting
from medpretrain.training.steps import Steps
from medpretrain.training.survey import Surveyor
from medpretrain.training.trainer import Trainer

STEPS = 10
"""Of each loop in a turn."""
CASES = {
    "modan_mulsupcon": {
        "backbone": {"name": "resnet18"},
        "views": {"crop": {"size": 64, "count": 2}},
        "method": {"name": "modan_mulsupcon"},
    },
    "dino": {
        "backbone": {"name": "vit_tiny_patch16_224"},
        "views": {"global": {"size": 64, "count": 2}, "local": {"size": 32, "count": 2}},
        "method": {"name": "dino", "prototypes": 4096},
    },
}
SEVERAL = {"class": ("a", "b", "c")}


def recipe(case: str, folder: Path, batch: int, every: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "overhead",
            "data": {"channels": 1, "labels": ["class"], "mean": [0.5], "std": [0.5]},
            "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.04, "clip": 3.0},
            "train": {"steps": 10**6, "global_batch": batch},
            "checkpoint": {"every": every, "keep": 1},
            "run": {"dir": str(folder)},
            "tracking": {"uri": "none"},
            **CASES[case],
        }
    )


class InMemory:
    """A stream of one batch, again and again."""

    replaced = 0

    def __init__(self, batch: Batch) -> None:
        self._batch, self.steps_per_epoch = batch, 100.0

    def batches(self, start: int) -> Generator[Batch]:
        step = start
        while True:
            yield replace(self._batch, step=step)
            step += 1


def one_batch(chosen: Recipe, process: Process) -> Batch:
    """This rank's part; other images on each."""
    draw = torch.Generator().manual_seed(process.rank)
    size = chosen.train.global_batch
    local = size // process.world
    views = {
        name: [torch.randn(local, 1, view.size, view.size, generator=draw) for _ in range(view.count)]
        for name, view in chosen.views.items()
    }
    labels = {"class": torch.randint(3, (size,), generator=torch.Generator().manual_seed(9))}
    return Batch(0, 0, size, process.rank * local, [views], labels, torch.arange(size))


def network(chosen: Recipe, process: Process) -> Any:
    counts = (chosen.train.global_batch,) * 3
    method = build_method(chosen, TrainingSet(3 * counts[0], SEVERAL, {"class": counts}))
    if process.world > 1:
        use_global_batchnorm(method, process.device)
    return method


class Bare:
    """What anyone would write first."""

    def __init__(self, chosen: Recipe, process: Process, batch: Batch) -> None:
        self._method = network(chosen, process).train()
        self._batch, self._step = batch, 0
        self._forward = self._method
        if process.world > 1:
            self._forward = DistributedDataParallel(self._method, forward_sync_buffers=False)
        parameters = [value for value in self._method.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.04, fused=True)
        self._parameters = parameters

    def once(self) -> None:
        batch = replace(self._batch, step=self._step)
        progress = Progress(self._step, 10**6, self._step / 100)
        self._optimizer.zero_grad(set_to_none=True)
        outputs = self._forward(batch.micro[0])
        loss = self._method.loss(outputs, batch, progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 3.0)
        self._optimizer.step()
        self._method.after_update({name: value.detach() for name, value in outputs.items()}, batch, progress)
        self._step += 1


def measure(process: Process, case: str, rounds: int, batch_size: int, saves: bool, folder: Path) -> dict[str, Any]:
    chosen = recipe(case, folder, batch_size, every=2 * STEPS if saves else 10**6)
    if process.leads:
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("{}\n")
    batch = one_batch(chosen, process)
    bare = Bare(chosen, process, batch)
    trainer = Trainer(network(chosen, process), chosen, process, total=10**6, steps_per_epoch=100.0)
    about = CheckpointInfo("", "0" * 64, (), process.world)
    target = open_target(None, folder)
    with (
        Preemption(process.world) as preemption,
        Watchdog(process, hang_s=600, slow=1.5, on_event=lambda event: None) as watchdog,
        reporting(chosen, about, process, 10**6, 0) as reporter,
    ):
        saver = Saver(target, about, process, keep=1)
        surveyor = Surveyor(lambda: None, "fp32")  # type: ignore[arg-type,return-value]
        ours = Steps(
            chosen, process, InMemory(batch), trainer, surveyor, reporter,  # type: ignore[arg-type]
            target, saver, watchdog, preemption, {}, 10**6,
        )  # fmt: skip
        step = 0

        def turn(which: str) -> float:
            nonlocal step
            if process.world > 1:
                dist.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                if which == "bare":
                    bare.once()
                else:
                    step = ours.once(step)
            return time.perf_counter() - began

        turn("bare"), turn("ours")  # buffers, threads
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for _ in range(rounds):
            one = {"bare": 0.0, "ours": 0.0}
            for which in ("bare", "ours", "ours", "bare"):
                one[which] += turn(which)
            for which, seconds in one.items():
                times[which].append(seconds / (2 * STEPS))
        ours.close()
        saver.close()
    ratios = np.array(times["ours"]) / np.array(times["bare"])
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(ratios, (2000, len(ratios))), axis=1)
    return {
        "case": case,
        "ranks": process.world,
        "saves": saves,
        "batch": batch_size,
        "rounds": rounds,
        "bare_ms": 1e3 * float(np.median(times["bare"])),
        "ours_ms": 1e3 * float(np.median(times["ours"])),
        "added": float(np.median(ratios) - 1),
        "interval": [float(np.quantile(medians, q) - 1) for q in (0.025, 0.975)],
    }


def markdown(rows: list[dict[str, Any]], about: str) -> str:
    """Rows come in pairs: without saves, and with."""
    every = Checkpoint().every
    lines = [
        f"| case | processes | bare, ms | a run adds | 95 % interval | a save adds, s | with one every {every} |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for plain, saving in zip(rows[::2], rows[1::2], strict=True):
        low, high = plain["interval"]
        save_s = (saving["added"] - plain["added"]) * saving["bare_ms"] / 1e3 * 2 * STEPS
        all_in_all = plain["added"] + save_s / (every * saving["bare_ms"] / 1e3)
        lines.append(
            f"| `{plain['case']}` | {plain['ranks']} | {plain['bare_ms']:.1f} | {plain['added']:+.2%} | "
            f"{low:+.2%} to {high:+.2%} | {save_s:.2f} | {all_in_all:+.2%} |"
        )
    return f"# What a run costs beside a bare loop\n\n{about}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=sorted(CASES), choices=sorted(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_into:
        with joined("cpu") as process:
            torch.set_num_threads(process.cores)
            rows = [
                measure(process, case, given.rounds, given.batch, saves, given.rank_into / f"{case}-{saves}")
                for case in given.cases
                for saves in (False, True)
            ]
            if process.leads:
                (given.rank_into / "rows.json").write_text(json.dumps(rows))
        return
    from exactness import run_ranks  # not in the ranks: it imports all methods

    rows = []
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--rounds", str(given.rounds), "--batch", str(given.batch), "--cases", *given.cases]
            run_ranks([__file__, "--rank-into", folder, *options], ranks, timeout=3600)
            rows += json.loads((Path(folder) / "rows.json").read_text())
    load = os.getloadavg()[1]
    command = " ".join(["python benchmarks/overhead.py", *sys.argv[1:]])
    about = (
        f"`{command}`, milliseconds of a step, {platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, CPU and gloo, global batch {given.batch}; load of the machine {load:.1f}."
    )
    print(text := markdown(rows, about))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "overhead.md").write_text(text)
        (given.out / "overhead.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if any(row["interval"][0] > 0.01 for row in rows if not row["saves"]):
        sys.exit("more than 1 % of a step's time is added")


if __name__ == "__main__":
    main()
