"""Checkpoints of one process."""

from __future__ import annotations

import pytest
import torch

from medpretrain.checkpoints import CheckpointInfo, FolderTarget, Part, Saver
from medpretrain.training.process import Process

ABOUT = CheckpointInfo(recipe="seed: 1\nname: ü\n", recipe_sha256="a" * 64, dataset_sha256=("b" * 64,), world_size=1)
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def tensors(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "method.weight": torch.randn(30, 5, generator=draw),
        "method.odd": torch.tensor([float("nan"), -0.0, float("inf")]),
        "method.half": torch.randn(7, generator=draw).bfloat16(),
        "method.images": torch.randn(2, 3, 4, 5, generator=draw).to(memory_format=torch.channels_last),
        "method.turned": torch.randn(6, 4, generator=draw).t(),
        "method.eight": torch.randn(9, generator=draw).to(torch.float8_e4m3fn),
        "method.waves": torch.randn(3, dtype=torch.complex64, generator=draw),
        "method.none": torch.empty(0, 4),
        "optimizer.step": torch.tensor(seed),
        "optimizer.mask": torch.rand(13, generator=draw) < 0.5,
    }


def parts(values):
    return [Part(name, tuple(value.shape), value) for name, value in values.items()]


def blank(values):
    return {name: torch.zeros_like(value) for name, value in values.items()}


def bits(values):
    return {
        name: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, value in values.items()
    }


class One:
    """Saves in the foreground; what went wrong is raised."""

    def __init__(self, target, **how):
        self.target = FolderTarget(target) if not hasattr(target, "names") else target
        self.how = {"keep": 9, "background": False} | how

    def save(self, step, seed=None, extra=None, metric=None, about=ABOUT, **how):
        saver = Saver(self.target, about, ALONE, **self.how | how)
        saver.save(step, parts(tensors(step if seed is None else seed)), extra or {}, metric)
        found = saver.wait()
        (outcome,) = saver.outcomes()
        saver.close()
        assert (outcome.error is None) == (found is not None)
        if outcome.error is not None:
            raise OSError(outcome.error)
        return found


@pytest.fixture
def one(tmp_path):
    return One(tmp_path / "checkpoints")
