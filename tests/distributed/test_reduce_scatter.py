"""Gloo's reduce-scatter of our own, over real processes that each have other numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from communication_ranks import settled
from medpretrain.losses.gather import reduce_scatter
from medpretrain.training.strategies.fsdp2 import _GlooReduceScatter
dist.init_process_group("gloo")
rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
found = {}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    whole = torch.load(sys.argv[1])[rank].to(dtype)
    own = torch.full((len(whole) // world, *whole.shape[1:]), torch.nan, dtype=dtype)
    reduce_scatter(own, whole)
    found[f"sum {dtype}"] = own.clone()
    for name in ("SUM", "AVG"):
        own.fill_(torch.nan)
        assert _GlooReduceScatter()(own, whole, group=group, op=getattr(dist.ReduceOp, name)) is None
        found[f"{name} {dtype}"] = own.clone()
try:
    _GlooReduceScatter()(own, whole, group=group, op=dist.ReduceOp.MAX)
except ValueError as error:
    found["refused"] = str(error)
large = torch.ones(1 << 18)
before = settled()
for _ in range(4):
    reduce_scatter(torch.empty(len(large) // world), large[: len(large) // world * world])
found["sent"] = (settled() - before) / 4 / large.nbytes
torch.save(found, f"{sys.argv[2]}/{rank}")
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_each_rank_gets_its_part_of_the_sum_and_sends_others_theirs_alone(run_ranks, tmp_path):
    world = 3
    data = torch.randn(world, 4 * world, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(world))
    torch.save(data, tmp_path / "data")
    run_ranks(["-c", WORKER, str(tmp_path / "data"), str(tmp_path), str(HERE)], world)
    for rank in range(world):
        found = torch.load(tmp_path / str(rank))
        for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2)):
            total = data.to(dtype).double().sum(0).chunk(world)[rank]
            for name, expected in (("sum", total), ("SUM", total), ("AVG", total / world)):
                got = found[f"{name} {dtype}"]
                assert got.dtype == dtype
                torch.testing.assert_close(got.double(), expected, rtol=error, atol=error)
        assert "MAX" in found["refused"]
        assert found["sent"] == pytest.approx((world - 1) / world, rel=0.02)
