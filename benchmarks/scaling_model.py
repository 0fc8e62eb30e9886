"""The model of scaling for real methods: shapes from the networks themselves, tables for 8 to 512 GPUs.

    python benchmarks/scaling_model.py [--slower 1] [--out benchmarks/results]

No GPU was at hand, so the time that one GPU computes is an assumption: 40 % of 989 TFLOP/s (H100, dense bf16) for
Vision Transformers, 20 % for ResNets. Operations are counted on the networks (torch's FlopCounterMode).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import write_by_rename
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medpretrain.methods.base import Method, TrainingSet
from medpretrain.models.blocks import blocks
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.communication import (
    Cluster,
    Exchange,
    Network,
    least_bytes,
    step_bytes,
    step_exchanges,
    step_seconds,
)

GATHERED = {"simclr": "z", "supcon": "z", "modan_mulsupcon": "z", "dino": None, "supervised": None}
"""Which output crosses ranks with its gradient."""
NVLINK, ROUND_WITHIN = 300e9, 3e-6
"""Bytes a second of a GPU, of the 450e9 that an H100's links have, and seconds of a message."""
FABRICS = {"400 Gbit/s InfiniBand": (45e9, 5e-6), "100 Gbit/s Ethernet": (11e9, 25e-6)}
"""Bytes a second of a host, nine tenths of the line, and seconds of a message."""
PEAK, VIT_USE, RESNET_USE = 989e12, 0.4, 0.2
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Shapes:
    """What `step_exchanges` wants to know of a method.

    Attributes:
        gathered, averaged: see there; of one process.
        operations: floating-point operations of its forward pass, the teacher's among them.
        without_gradient: of these, those of networks that are not trained.
    """

    networks: list[Network]
    gathered: int
    averaged: int
    operations: float
    without_gradient: float

    def exchanges(self, world: int, **options: Any) -> list[Exchange]:
        return step_exchanges(self.networks, world=world, gathered=self.gathered, averaged=self.averaged, **options)


def shapes(recipe: Recipe, images: int, classes: int = 3) -> Shapes:
    """Of a method with `images` images a process, from one forward pass without memory."""
    names = {kind: tuple(f"c{i}" for i in range(classes)) for kind in recipe.data.labels}
    data = TrainingSet(1000, names, dict.fromkeys(names, (100,) * classes))
    with torch.device("meta"):
        method = build_method(recipe, data)
        views = {
            name: [torch.empty(images, recipe.data.channels, view.size, view.size)] * view.count
            for name, view in recipe.views.items()
        }
        outputs, networks, operations, alone = _forward(method, views)
    name = recipe.method["name"]
    output = GATHERED[name]
    averaged = method.center.numel() if name == "dino" else 0  # type: ignore[operator, union-attr]
    return Shapes(networks, outputs[output].numel() if output else 0, averaged, operations, alone)


def _forward(method: Method, views: Any) -> tuple[dict[str, Tensor], list[Network], float, float]:
    found = _called(method)
    calls = dict.fromkeys(found, 0)

    def count(module: nn.Module, *_: object) -> None:
        calls[module] += 1

    hooks = [network.register_forward_hook(count) for network in found]
    with FlopCounterMode(display=False) as counter:
        outputs = method(views)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in method.named_modules()}
    by_module = counter.get_flop_counts()
    kind = type(method).__name__
    networks, alone = [], 0.0
    for network in found:
        trained = any(parameter.requires_grad for parameter in network.parameters())
        if not trained:
            alone += sum(by_module.get(f"{kind}.{names[network]}", {}).values())
        norms = tuple(
            layer.num_features for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        )
        networks.append(Network(_units(network), calls[network], trained, norms))
    return outputs, networks, float(counter.get_total_flops()), float(alone)


def _called(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            found += _called(child)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


def _units(network: nn.Module) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Shapes in the order of definition within each block; what is in no block comes last, as the root's."""
    units = [list(block.parameters()) for block in blocks(network)]
    inside = {parameter for unit in units for parameter in unit}
    rest = [parameter for parameter in network.parameters() if parameter not in inside]
    return tuple(tuple(tuple(one.shape) for one in unit) for unit in [*units, rest] if unit)


def _recipe(method: dict[str, Any], backbone: str, views: dict[str, Any], labels: list[str]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "model",
            "data": {"labels": labels},
            "backbone": {"name": backbone},
            "views": views,
            "method": method,
            "optim": {"name": "adamw", "lr": 1e-3},
            "train": {"steps": 1, "global_batch": 64},
        }
    )


_DINO_VIEWS = {"global": {"size": 224, "count": 2}, "local": {"size": 96, "count": 8}}
CASES: dict[str, tuple[Recipe, int, float]] = {
    "DINO, ViT-S/16": (_recipe({"name": "dino"}, "vit_small_patch16_224", _DINO_VIEWS, []), 64, VIT_USE),
    "DINO, ViT-B/16": (_recipe({"name": "dino"}, "vit_base_patch16_224", _DINO_VIEWS, []), 32, VIT_USE),
    "ModAn-MulSupCon, ResNet-50": (
        _recipe({"name": "modan_mulsupcon"}, "resnet50", {"crop": {"size": 224, "count": 2}}, ["modality", "anatomy"]),
        64,
        RESNET_USE,
    ),
}
"""Recipe, images a GPU, and the part of its peak that a GPU is taken to reach."""


def seconds_of_compute(found: Shapes, use: float) -> tuple[float, float]:
    """Forward and backward, of which the trained part costs twice as much."""
    forward = found.operations / (PEAK * use)
    return forward, 2 * (found.operations - found.without_gradient) / (PEAK * use)


def table(slower: float = 1.0) -> list[dict[str, Any]]:
    rows = []
    for case, (recipe, images, use) in CASES.items():
        found = shapes(recipe, images)
        forward_s, backward_s = seconds_of_compute(found, use / slower)
        for strategy in ("ddp", "fsdp2", "deepspeed"):
            for fabric, (rate, latency) in FABRICS.items():
                for gpus in GPUS:
                    cluster = Cluster(gpus // 8, 8, NVLINK, rate, ROUND_WITHIN, latency)
                    step = found.exchanges(gpus, strategy=strategy)
                    took = step_seconds(step, cluster, forward_s, backward_s)
                    rows.append(
                        {
                            "case": case,
                            "strategy": "deepspeed ZeRO-2" if strategy == "deepspeed" else strategy,
                            "fabric": fabric,
                            "gpus": gpus,
                            "images_a_gpu": images,
                            "trained_parameters": sum(n.bytes for n in found.networks if n.trained) // 4,
                            "compute_ms": 1e3 * (forward_s + backward_s),
                            "least_mb": least_bytes(step, gpus) / 1e6,
                            "sent_mb": step_bytes(step, gpus) / 1e6,
                            "step_ms": 1e3 * took,
                            "efficiency": (forward_s + backward_s) / took,
                        }
                    )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | strategy | between hosts | compute, ms | sent at 512, MB | " + " | ".join(map(str, GPUS)) + " |",
        "| --- | --- | --- | ---: | ---: |" + " ---: |" * len(GPUS),
    ]
    for start in range(0, len(rows), len(GPUS)):
        same = rows[start : start + len(GPUS)]
        last = same[-1]
        cells = [last["case"], last["strategy"], last["fabric"], f"{last['compute_ms']:.0f}", f"{last['sent_mb']:.0f}"]
        lines.append("| " + " | ".join(cells + [f"{row['efficiency']:.0%}" for row in same]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slower", type=float, default=1.0, help="how many times longer a GPU computes than assumed")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = table(given.slower)
    print(text := markdown(rows))
    if given.out:
        about = (
            "# Efficiency by the model, 8 to 512 GPUs: nothing here is measured; docs/scaling.md has the assumptions"
        )
        write_by_rename(given.out / "scaling_model.md", f"{about}\n\n{text}")
        write_by_rename(given.out / "scaling_model.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
