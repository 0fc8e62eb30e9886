"""Is a method on several ranks the same method? And does it go on where it stopped?

    python benchmarks/exactness.py [--methods dino byol ...] [--worlds 1 2 4] [--out benchmarks/results]

For each method: three training steps, then the gradient of a fourth, in float64 on a tiny network, with different
images on every rank, against one process that holds the global batch: the ratio of the norms and the cosine of all
parameters' gradients, and the largest difference of any buffer (teachers, queues, centres). Then, in float32: six steps
at once against three, a checkpoint file and three more in new objects; parameters, buffers, optimizer and losses must
be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medpretrain.checkpoints.parts import Part
from medpretrain.data.batches import Batch, Views
from medpretrain.losses.gather import mean_over_ranks
from medpretrain.methods import METHODS, method_class
from medpretrain.methods.base import TrainingSet
from medpretrain.models.batchnorm import use_global_batchnorm
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process, joined
from medpretrain.training.trainer import Trainer

IMAGES, STEPS = 12, 3
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
COUNTS = {"finding": (2, 3), "class": (5, 0, 2, 3), "modality": (2, 3, 4), "anatomy": (2, 3, 4, 5)}
"""Images of each class, in the training set that methods are told of."""


@dataclass(frozen=True)
class Case:
    """What a method is tried with; the smallest that still has all its parts."""

    options: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


SMALL: dict[str, Any] = {"projector": [16, 8]}
PREDICTED = SMALL | {"predictor": [16, 8]}
QUEUE = {"queue": 20}
"""No multiple of the batch, so that it wraps around."""
CASES = {
    "amimv": Case(SMALL | {"momentum": 0.9}),
    "barlow_twins": Case(SMALL),
    "bcl": Case(SMALL | {"instance_weight": 0.5}, ("class",)),
    "byol": Case(PREDICTED),
    "dino": Case({"prototypes": 24, "hidden": 16, "bottleneck": 8, "freeze_last_layer_epochs": 0.5}),
    "kcl": Case(SMALL | QUEUE, ("class",)),
    "moco_v3": Case(PREDICTED | {"predictor_norm": True}),
    "modan_mulsupcon": Case({"instance_weight": 0.5}, ("modality", "anatomy")),
    "nnclr": Case(PREDICTED | QUEUE),
    "paco": Case(SMALL | QUEUE, ("class",)),
    "ressl": Case(SMALL | QUEUE),
    "sbc": Case(SMALL | {"smallest_subclass": 2, "warmup_epochs": 0, "every_epochs": 1}, ("class",)),
    "simclr": Case(SMALL),
    "supcon": Case(SMALL, ("class",)),
    "supervised": Case({"weighting": "inverse", "focusing": 2.0}, ("modality", "anatomy")),
    "supervised_minority": Case(SMALL, ("finding",)),
    "supervised_prototypes": Case(SMALL, ("finding",)),
    "tsc": Case(SMALL | QUEUE, ("class",)),
    "vicreg": Case({"projector": [16, 20]}),
}


def recipe(
    method: str,
    backbone: str,
    *,
    micro_batches: int = 1,
    plain_heads: bool = False,
    strategy: str = "ddp",
    **train: Any,
) -> Recipe:
    kinds, options = method_class(method).view_kinds, CASES[method].options
    if plain_heads:
        options = options | {
            name: widths[-1:] for name, widths in options.items() if name in ("projector", "predictor")
        }
        norms = {"projector_norm", "predictor_norm"} & method_class(method).options.model_fields.keys()
        options = options | dict.fromkeys(norms, False)
    return Recipe.model_validate(
        {
            "name": "exactness",
            "data": {"channels": 1, "labels": list(CASES[method].labels), "mean": [0.5], "std": [0.5]},
            "backbone": {"name": f"test_{backbone}", "drop_path": 0.2},
            "views": {
                kind: {"size": 32 if least else 16, "count": max(least, 2 if method in ("dino", "supervised") else 1)}
                for kind, least in kinds.items()
            },
            "method": {"name": method, **options},
            "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.04},
            "train": {"steps": 10, "global_batch": IMAGES, "micro_batches": micro_batches} | train,
            "strategy": strategy,
        }
    )


def batch(chosen: Recipe, step: int, process: Process, dtype: torch.dtype) -> Batch:
    """The rank's part of a step's global batch, which is drawn whole from the step's number."""
    draw = torch.Generator().manual_seed(step)
    # Images differ in mean and scale, so that normalising per rank shows.
    lift = torch.linspace(0.2, 3, IMAGES)[torch.randperm(IMAGES, generator=draw)][:, None, None, None]
    everything: Views = {
        name: [
            (torch.randn(IMAGES, 1, view.size, view.size, generator=draw) * lift + lift).to(process.device, dtype)
            for _ in range(view.count)
        ]
        for name, view in chosen.views.items()
    }
    labels = {kind: _labels(kind, draw).to(process.device) for kind in chosen.data.labels}
    local = IMAGES // process.world
    first, size = process.rank * local, local // chosen.train.micro_batches
    micro = [
        {name: [one[start : start + size] for one in views] for name, views in everything.items()}
        for start in range(first, first + local, size)
    ]
    samples = torch.randperm(IMAGES, generator=draw).to(process.device)
    return Batch(step=step, seed=0, size=IMAGES, first=first, micro=micro, labels=labels, samples=samples)


def _labels(kind: str, draw: torch.Generator) -> Tensor:
    """Of the classes that have images, and some unknown."""
    there = torch.tensor([-1] + [number for number, count in enumerate(COUNTS[kind]) if count])
    return there[torch.randint(len(there), (IMAGES,), generator=draw)]


def trainer(chosen: Recipe, process: Process, dtype: torch.dtype) -> Trainer:
    """Fresh, and shown all training images if it asks for them."""
    kinds = chosen.data.labels
    data = TrainingSet(
        samples=IMAGES,
        classes={kind: tuple(map(str, range(len(COUNTS[kind])))) for kind in kinds},
        counts={kind: COUNTS[kind] for kind in kinds},
    )
    method = build_method(chosen, data).to(process.device, dtype)
    if process.world > 1:
        use_global_batchnorm(method, process.device)
    made = Trainer(method, chosen, process, total=10, steps_per_epoch=3.0)
    if method.wants_survey(made.progress(0)):
        draw = torch.Generator().manual_seed(17)
        width = method.embed(torch.zeros(2, 1, 32, 32, dtype=dtype, device=process.device)).shape[1]
        labels = {kind: _labels(kind, draw).to(process.device) for kind in kinds}
        method.survey(torch.randn(IMAGES, width, generator=draw).to(process.device, dtype), labels)
    return made


def precision(strategy: str) -> torch.dtype:
    """DeepSpeed steps float32 alone; there rounding grows in the steps before, to 1e-4 of a gradient or so."""
    return torch.float32 if strategy == "deepspeed" else torch.float64


def gradients(
    process: Process, method: str, backbone: str, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    """The gradient of every parameter after some steps, the loss, and every buffer.

    Args:
        options: of `recipe`; `plain_heads` are linear heads, so that with a ViT there is no BatchNorm, whose statistics
            are a micro-batch's own.
    """
    chosen = recipe(method, backbone, **options)
    one = trainer(chosen, process, dtype)
    for step in range(STEPS):
        one.step(batch(chosen, step, process, dtype))
    last = batch(chosen, STEPS, process, dtype)
    loss, outputs = one.backward(last, one.progress(STEPS))
    found = whole_gradients(one)
    one.method.after_update(outputs, last, one.progress(STEPS))
    buffers = {f"buffer {name}": value for name, value in one.method.named_buffers()}
    return {name: value.cpu() for name, value in (found | buffers | {"loss": mean_over_ranks(loss)}).items()}


def whole_gradients(one: Trainer) -> dict[str, Tensor]:
    """The gradient of each trained parameter, from the parts of all ranks; the moments of AdamW are cut as it is."""
    cuts = {part.name: part for part in one.parts()}
    found = {}
    for name, gradient in zip(one.strategy.names, one.strategy.gradients(), strict=True):
        cut = cuts[f"optimizer.{name}.exp_avg"]
        if cut.copied:
            if gradient is not None:
                found[name] = gradient
            continue
        whole = torch.zeros(cut.shape, dtype=cut.values.dtype, device=cut.values.device)
        if gradient is not None:
            whole.view(-1)[cut.start : cut.start + len(cut.values)] = gradient.reshape(-1)
        if dist.is_initialized():
            dist.all_reduce(whole)
        found[name] = whole
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Ratio of the gradients' norms, their cosine, and the largest difference of a buffer and of the loss."""
    assert found.keys() == expected.keys()
    names = [name for name in found if not name.startswith("buffer ") and name != "loss"]
    a, b = (torch.cat([grads[name].flatten() for name in names]).double() for grads in (found, expected))
    rest = [(found[name].double() - expected[name].double()).abs().max().item() for name in found if name not in names]
    return {
        "ratio": (a.norm() / b.norm()).item(),
        "cosine": (a @ b / a.norm() / b.norm()).item(),
        "buffers": max(rest),
    }


def resumed_to_the_bit(method: str, backbone: str) -> bool:
    """Whether three steps, a file and three more are six steps."""
    chosen = recipe(method, backbone)
    whole = trainer(chosen, ALONE, torch.float32)
    for step in range(2 * STEPS):
        if step == STEPS:
            kept = {part.name: part.values.clone() for part in whole.parts()}
        expected = whole.step(batch(chosen, step, ALONE, torch.float32)).loss
    other = trainer(chosen, ALONE, torch.float32)
    for value in other.method.state_dict().values():  # what is not read back shows
        value.copy_(~value if value.dtype == torch.bool else value + 1)
    for part in other.parts():
        part.values.copy_(kept[part.name])
    other.loaded()
    for step in range(STEPS, 2 * STEPS):
        loss = other.step(batch(chosen, step, ALONE, torch.float32)).loss
    return torch.equal(loss, expected) and _bits(other.parts()) == _bits(whole.parts())


def _bits(parts: list[Part]) -> Any:
    return [(part.name, part.values.dtype, tuple(part.values.shape), part.values.numpy().tobytes()) for part in parts]


def run_ranks(arguments: list[str], world: int, *, timeout: float = 120) -> None:
    """`python *arguments` as each rank of a gloo group on loopback; all must end with 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(world)
    ]
    try:
        codes = [rank.wait(timeout) for rank in ranks]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def on_ranks(
    methods: list[str],
    backbones: list[str],
    world: int,
    micro_batches: int = 1,
    strategy: str = "ddp",
    zero_stage: int = 2,
) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank found, for every `method backbone`; real processes on loopback.

    With several micro-batches, with plain heads.
    """
    given = ["--methods", *methods, "--backbones", *backbones, "--micro-batches", str(micro_batches)]
    given += ["--strategy", strategy, "--zero-stage", str(zero_stage)]
    with tempfile.TemporaryDirectory() as folder:
        run_ranks([__file__, "--rank-into", folder, *given], world, timeout=600)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(world)]


def table(
    methods: list[str], backbones: list[str], worlds: list[int], strategy: str, zero_stage: int
) -> list[dict[str, Any]]:
    """A row for each method and backbone."""
    found = {world: on_ranks(methods, backbones, world, strategy=strategy, zero_stage=zero_stage) for world in worlds}
    rows = []
    for method in methods:
        for backbone in backbones:
            single = gradients(ALONE, method, backbone, precision(strategy))
            row: dict[str, Any] = {"method": method, "backbone": backbone}
            for world, ranks in found.items():
                compared = [compare(rank[f"{method} {backbone}"], single) for rank in ranks]
                row[f"ranks {world}"] = {
                    "ratio": max((one["ratio"] for one in compared), key=lambda value: abs(value - 1)),
                    "cosine": min(one["cosine"] for one in compared),
                    "buffers": max(one["buffers"] for one in compared),
                }
            row["resumes"] = resumed_to_the_bit(method, backbone)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def markdown(rows: list[dict[str, Any]], worlds: list[int], about: str) -> str:
    head = "| method | backbone |" + "".join(f" {n} ranks: 1 - ratio | 1 - cosine | buffers |" for n in worlds)
    lines = [f"{head} resumes to the bit |", "| --- |" * 1 + " --- |" * (2 + 3 * len(worlds))]
    for row in rows:
        cells = [f"`{row['method']}`", row["backbone"]]
        for world in worlds:
            found = row[f"ranks {world}"]
            cells += [f"{1 - found['ratio']:.0e}", f"{1 - found['cosine']:.0e}", f"{found['buffers']:.0e}"]
        lines.append("| " + " | ".join([*cells, "yes" if row["resumes"] else "NO"]) + " |")
    return f"# Exactness\n\n{about}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--backbones", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp2", "deepspeed"])
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4), help="of deepspeed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batches", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_into:
        torch.set_num_threads(1)
        with joined("cpu") as process:
            results = {
                f"{method} {backbone}": gradients(
                    process,
                    method,
                    backbone,
                    precision(given.strategy),
                    micro_batches=given.micro_batches,
                    plain_heads=given.micro_batches > 1,
                    strategy=given.strategy,
                    zero_stage=given.zero_stage,
                )
                for method in given.methods
                for backbone in given.backbones
            }
            torch.save(results, given.rank_into / f"rank{process.rank}.pt")
        return
    if given.strategy == "deepspeed" and given.zero_stage == 3:  # refused where a loss reads parameters
        given.methods = [name for name in given.methods if not method_class(name).read_by_loss]
    rows = table(given.methods, given.backbones, given.worlds, given.strategy, given.zero_stage)
    dtype = str(precision(given.strategy)).removeprefix("torch.")
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, gloo, {dtype}"
    command = " ".join(["python benchmarks/exactness.py", *sys.argv[1:]])
    about = f"`{command}`, {machine}; {IMAGES} images a global batch, {STEPS} steps before."
    text = markdown(rows, given.worlds, about)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "exactness.md").write_text(text)
        (given.out / "exactness.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    tolerance = 1e-5 if precision(given.strategy) == torch.float64 else 1e-3
    bad = [
        row
        for row in rows
        if not row["resumes"]
        or any(abs(1 - row[f"ranks {world}"][key]) > tolerance for world in given.worlds for key in ("ratio", "cosine"))
    ]
    if bad:
        sys.exit(f"not exact: {', '.join(row['method'] + ' ' + row['backbone'] for row in bad)}")


if __name__ == "__main__":
    main()
