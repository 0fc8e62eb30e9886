"""One rank of the long-tail test: `python long_tail.py FOLDER` writes rankN.pt with what two steps came to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from medpretrain.data.batches import Batch
from medpretrain.losses.gather import mean_over_ranks
from medpretrain.methods.base import TrainingSet
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process, joined
from medpretrain.training.trainer import Trainer

IMAGES = 12
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
# Projectors of one layer have no BatchNorm, whose statistics would be a micro-batch's own.
METHODS = {"bcl": {"instance_weight": 0.5}, "paco": {"queue": 16}, "sbc": {"smallest_subclass": 2}}
DATA = TrainingSet(samples=40, classes={"class": ("a", "b", "c", "d")}, counts={"class": (20, 0, 12, 5)})
KNOWN = torch.tensor([0] * 20 + [2] * 12 + [3] * 5 + [-1] * 3)


def after_two_steps(process: Process, name: str, *, micro_batches: int = 1) -> dict[str, Tensor]:
    """The loss and the gradients of the second step, and the state after it."""
    recipe = Recipe.model_validate(
        {
            "name": "long-tail",
            "data": {"channels": 1, "labels": ["class"], "mean": [0.5], "std": [0.5]},
            "backbone": {"name": "test_vit"},
            "views": {"crop": {"size": 32, "count": 2}},
            "method": {"name": name, "projector": [8], **METHODS[name]},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {"steps": 10, "global_batch": IMAGES},
        }
    )
    method = build_method(recipe, DATA).double()
    trainer = Trainer(method, recipe, process, total=10, steps_per_epoch=3.0)
    draw = torch.Generator().manual_seed(7)
    method.survey(torch.randn(40, 8, generator=draw), {"class": KNOWN})
    local = IMAGES // process.world
    first, size = process.rank * local, local // micro_batches
    found = {}
    for step in range(2):
        views = [torch.randn(IMAGES, 1, 32, 32, dtype=torch.float64, generator=draw) for _ in range(2)]
        starts = range(first, first + local, size)
        micro = [{"crop": [images[start : start + size] for images in views]} for start in starts]
        # The first half has fewer known labels than the second.
        samples = torch.cat([torch.tensor([37, 38, 39]), torch.randperm(37, generator=draw)[: IMAGES - 3]])
        batch = Batch(step, 0, IMAGES, first, micro, {"class": KNOWN[samples]}, samples)
        loss = trainer.step(batch).loss
        found = {f"gradient {key}": value.grad for key, value in method.named_parameters() if value.grad is not None}
        found["loss"] = mean_over_ranks(loss)
    return found | dict(method.state_dict())


if __name__ == "__main__":
    with joined("cpu") as process:
        results = {
            (name, micro_batches): after_two_steps(process, name, micro_batches=micro_batches)
            for name in METHODS
            for micro_batches in (1, 2)
        }
        torch.save(results, Path(sys.argv[1]) / f"rank{process.rank}.pt")
