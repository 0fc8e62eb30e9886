"""What each process writes: everything once, and about as much as the others."""

from __future__ import annotations

import random

import pytest
import torch

from medpretrain.checkpoints import Part
from medpretrain.checkpoints.manifest import check_whole
from medpretrain.checkpoints.parts import DIVIDED, joined, lay_out, share

from .conftest import parts


def test_whatever_the_sizes_every_element_is_written_once_and_the_work_is_shared():
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(30):
        world = draw.randint(1, 9)
        sizes = [draw.choice((0, 1, 64, 1000, DIVIDED - 1, DIVIDED, DIVIDED + 1, 300_000)) for _ in range(20)]
        dtypes = [draw.choice((torch.bool, torch.float16, torch.float32, torch.int64)) for _ in sizes]
        values = {
            f"t{number}": torch.zeros((), dtype=dtype).expand(size)
            for number, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
        }
        slices = [share(parts(values), rank, world) for rank in range(world)]
        found = joined(lay_out(mine, f"{rank}").tensors for rank, mine in enumerate(slices))
        assert found.keys() == values.keys()
        check_whole(found)
        loads = [sum(each.bytes for each in mine) for mine in slices]
        assert max(loads) - min(loads) <= DIVIDED * 8  # the largest tensor that is not divided


def test_two_processes_that_disagree_about_a_tensor_are_told():
    halves = [Part("w", (4,), torch.zeros(2), copied=False), Part("w", (4,), torch.zeros(2).half(), 2, copied=False)]
    layouts = [lay_out(share([part], rank, 2), f"{rank}").tensors for rank, part in enumerate(halves)]
    with pytest.raises(AssertionError, match=r"w is F32 \(4,\) and F16"):
        joined(layouts)


def test_every_number_is_aligned_in_the_file():
    values = {"a": torch.zeros(3).bool(), "b": torch.zeros(5).double(), "c": torch.zeros(1).half(), "d": torch.zeros(2)}
    for stored in lay_out(share(parts(values), 0, 1), "f").tensors.values():
        width = {"BOOL": 1, "F64": 8, "F16": 2, "F32": 4}[stored.dtype]
        assert stored.pieces[0].offset % width == 0
