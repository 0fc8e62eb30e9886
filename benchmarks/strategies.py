"""Do DDP, FSDP2 and ZeRO 0 to 3 train alike, and what does each hold?

    python benchmarks/strategies.py [--steps 100] [--out benchmarks/results]

Two processes with different images, DINO on vit_tiny and MODAN-MulSupCon on resnet18 at 32 pixels, AdamW in float32.
Every strategy is launched anew: the largest relative difference of a loss to DDP's of the same step and rank, and for
rank 0 the bytes of parameters (with teachers and master copies), of gradients at the moment before a step, of the
optimizer's state, each storage once, and the peak of its resident memory with that before the networks were built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from exactness import COUNTS, IMAGES, batch, run_ranks
from torch import Tensor

from medpretrain.methods.base import TrainingSet
from medpretrain.models.batchnorm import use_global_batchnorm
from medpretrain.models.ema import held
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process, joined
from medpretrain.training.trainer import Trainer

STRATEGIES = {"ddp": ("ddp", 0), "fsdp2": ("fsdp2", 0)} | {f"zero{stage}": ("deepspeed", stage) for stage in range(4)}
METHODS: dict[str, dict[str, Any]] = {
    "dino": {
        "backbone": {"name": "vit_tiny_patch16_224"},
        "views": {"global": {"size": 32, "count": 2}, "local": {"size": 16, "count": 2}},
        "method": {"name": "dino", "prototypes": 4096, "hidden": 512, "bottleneck": 128},
    },
    "modan_mulsupcon": {
        "backbone": {"name": "resnet18"},
        "views": {"crop": {"size": 32, "count": 2}},
        "method": {"name": "modan_mulsupcon"},
    },
}


def trainer(method: str, strategy: str, steps: int, process: Process) -> tuple[Trainer, Recipe]:
    name, stage = STRATEGIES[strategy]
    labels = ["modality", "anatomy"] if method == "modan_mulsupcon" else []
    chosen = Recipe.model_validate(
        METHODS[method]
        | {
            "name": "strategies",
            "data": {"channels": 1, "labels": labels, "mean": [0.5], "std": [0.5]},
            "optim": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.04, "warmup": 0.1, "clip": 3.0},
            "train": {"steps": steps, "global_batch": IMAGES, "zero_stage": stage},
            "strategy": name,
        }
    )
    data = TrainingSet(
        samples=IMAGES,
        classes={kind: tuple(map(str, range(len(COUNTS[kind])))) for kind in labels},
        counts={kind: COUNTS[kind] for kind in labels},
    )
    built = use_global_batchnorm(build_method(chosen, data), process.device)
    return Trainer(built, chosen, process, total=steps, steps_per_epoch=10.0), chosen


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of the storages behind tensors, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(method: str, strategy: str, steps: int, process: Process) -> dict[str, Any]:
    if STRATEGIES[strategy][0] == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401  its import is not what the networks take
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one, chosen = trainer(method, strategy, steps, process)
    found: dict[str, Any] = {"losses": []}
    for step in range(steps):
        given = batch(chosen, step, process, torch.float32)
        if step == 1:
            one.backward(given, one.progress(step))
            found["gradients"] = held_bytes(one.strategy.gradients())
            one.strategy.drop_gradients()
        measured = one.step(given)
        assert measured.finite
        found["losses"].append(measured.loss.item())
    parameters = [held(value) for value in one.method.parameters()]
    stepped = [value for group in one.optimizer.param_groups for value in group["params"]]
    stepped += [value for value in one.optimizer.state if isinstance(value, Tensor)]
    state = [value for kept in one.optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    found["parameters"] = held_bytes([*parameters, *stepped])
    found["optimizer"] = held_bytes(state)
    found["peak RSS"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["RSS before"] = before * 1024
    return found


def compared(steps: int) -> list[dict[str, Any]]:
    """A row for each method and strategy."""
    rows = []
    for method in METHODS:
        expected: list[list[float]] = []
        for strategy in STRATEGIES:
            with tempfile.TemporaryDirectory() as folder:
                given = ["--rank-into", folder, "--steps", str(steps), "--only", method, strategy]
                run_ranks([__file__, *given], 2, timeout=900)
                ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)]
            losses = [rank.pop("losses") for rank in ranks]
            expected = expected or losses
            pairs = [
                pair for mine, theirs in zip(losses, expected, strict=True) for pair in zip(mine, theirs, strict=True)
            ]
            difference = max(abs(a - b) / abs(b) for a, b in pairs)
            rows.append({"method": method, "strategy": strategy, "loss difference": difference} | ranks[0])
            rows[-1] |= {"first loss": losses[0][0], "last loss": losses[0][-1]}
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def markdown(rows: list[dict[str, Any]], about: str) -> str:
    columns = ["parameters", "gradients", "optimizer", "RSS before", "peak RSS"]
    head = f"| method | strategy | loss difference | {' | '.join(f'{name}, MB' for name in columns)} |"
    lines = [head, "| --- |" + " --- |" * (2 + len(columns))]
    for row in rows:
        cells = [f"{row[name] / 1e6:.1f}" for name in columns]
        lines.append(f"| {row['method']} | {row['strategy']} | {row['loss difference']:.0e} | {' | '.join(cells)} |")
    return f"# Strategies\n\n{about}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rank-into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_into:
        torch.set_num_threads(1)
        with joined("cpu") as process:
            found = measure(*given.only, given.steps, process)
            (given.rank_into / f"rank{process.rank}.json").write_text(json.dumps(found))
        return
    rows = compared(given.steps)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, gloo, float32"
    text = markdown(
        rows,
        f"`python benchmarks/strategies.py --steps {given.steps}`, {machine}; 2 processes, {IMAGES} images a step.",
    )
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "strategies.md").write_text(text)
        (given.out / "strategies.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
