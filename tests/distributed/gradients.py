"""One rank of the gradient test: `python gradients.py FOLDER` writes rankN.pt with the gradients of every method.

The global batch is drawn from one seed; each rank takes its own, different part of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from medpretrain.data.batches import Batch, Views
from medpretrain.losses.gather import mean_over_ranks
from medpretrain.methods.base import TrainingSet
from medpretrain.models.batchnorm import use_global_batchnorm
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process, joined
from medpretrain.training.trainer import Trainer

IMAGES = 12
VIEWS = {
    "dino": {"global": (2, 32), "local": (3, 16)},
    "modan_mulsupcon": {"crop": (2, 32)},
    "amimv": {"normalised": (1, 32), "augmented": (1, 32)},
}
OPTIONS = {"dino": {"prototypes": 24, "hidden": 16, "bottleneck": 8}, "modan_mulsupcon": {}, "amimv": {}}
BACKBONES = {"resnet": "test_resnet", "vit": "test_vit"}
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
LABELS = {"modality": 3, "anatomy": 4}
DATA = TrainingSet(
    samples=IMAGES,
    classes={kind: tuple(map(str, range(size))) for kind, size in LABELS.items()},
    counts={kind: tuple(range(1, size + 1)) for kind, size in LABELS.items()},
)


def recipe(method: str, backbone: str) -> Recipe:
    views = {name: {"size": size, "count": count} for name, (count, size) in VIEWS[method].items()}
    return Recipe.model_validate(
        {
            "name": "gradients",
            "data": {"channels": 1, "labels": list(LABELS), "mean": [0.5], "std": [0.5]},
            "backbone": {"name": BACKBONES[backbone]},
            "views": views,
            "method": {"name": method, **OPTIONS[method]},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {"steps": 10, "global_batch": IMAGES},
        }
    )


def global_views(method: str) -> Views:
    torch.manual_seed(11)
    # Images differ in mean and scale, so that normalising per rank shows.
    lift = torch.linspace(0.2, 3, IMAGES, dtype=torch.float64)[:, None, None, None]
    return {
        name: [torch.randn(IMAGES, 1, size, size, dtype=torch.float64) * lift + lift for _ in range(count)]
        for name, (count, size) in VIEWS[method].items()
    }


def part(views: Views, first: int, count: int) -> Views:
    return {name: [images[first : first + count] for images in group] for name, group in views.items()}


def gradients(process: Process, method: str, backbone: str, *, micro_batches: int = 1) -> dict[str, Tensor]:
    """The gradient of every parameter, the loss, and what the method updates, after one step on this rank's part."""
    chosen = recipe(method, backbone)
    model = build_method(chosen, DATA).double()
    if process.world > 1:
        model = use_global_batchnorm(model)
    trainer = Trainer(model, chosen, process, total=10, steps_per_epoch=3.0)
    local = IMAGES // process.world
    first = process.rank * local
    views, size = global_views(method), local // micro_batches
    micro = [part(views, first + turn * size, size) for turn in range(micro_batches)]
    torch.manual_seed(5)
    labels = {name: torch.randint(-1, classes, (IMAGES,)) for name, classes in LABELS.items()}
    batch = Batch(step=4, seed=0, size=IMAGES, first=first, micro=micro, labels=labels, samples=torch.arange(IMAGES))
    loss, outputs = trainer.backward(batch, trainer.progress(4))
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.after_update(outputs, batch, trainer.progress(4))
    buffers = {f"buffer {name}": value for name, value in model.named_buffers()}
    return found | buffers | {"loss": mean_over_ranks(loss)}


if __name__ == "__main__":
    with joined("cpu") as process:
        results = {
            f"{method} {backbone}": gradients(process, method, backbone)
            for method in VIEWS
            for backbone in (BACKBONES if method == "dino" else ["resnet"])
        }
        torch.save(results, Path(sys.argv[1]) / f"rank{process.rank}.pt")
