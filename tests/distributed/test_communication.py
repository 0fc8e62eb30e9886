"""The formulas of what a step sends hold for real steps, and say what is known by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from medpretrain.training.communication import (
    Cluster,
    Exchange,
    Network,
    beside,
    ddp_buckets,
    least_bytes,
    step_bytes,
    step_exchanges,
    step_seconds,
)

WORKER = Path(__file__).with_name("communication_ranks.py")
LAYER = Network(units=(((100, 10), (100,)), ((7, 100),)))  # 1,800 parameters


def of(strategy, world, networks=(LAYER,), **options):
    return step_exchanges(networks, world=world, strategy=strategy, **options)


@pytest.fixture(scope="module")
def counted(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    run_ranks([str(WORKER), str(folder)], 2, timeout=200)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["dino ddp", "dino fsdp2", "simclr ddp"])
def test_bytes_of_a_real_step_are_those_of_the_formula(counted, case):
    """DINO calls its student twice, and SimCLR gathers embeddings, here of two micro-batches."""
    for rank in counted:
        assert rank[case]["sent"] == pytest.approx(rank[case]["formula"], rel=0.05)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["dino ddp", "dino fsdp2", "simclr ddp"])
def test_a_step_sends_no_more_than_it_must(counted, case):
    for rank in counted:
        assert rank[case]["sent"] < 1.05 * rank[case]["least"]


@pytest.mark.distributed
def test_fsdp2_cuts_nothing_that_has_one_row(counted):
    """Padding would be sent in place of it, as much from every rank."""
    for rank in counted:
        assert rank["dino fsdp2"]["cut"]
        assert not [name for name in rank["dino fsdp2"]["cut"] if "pos_embed" in name or "cls_token" in name]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_ring_sends_each_gradient_twice_but_for_a_share(world):
    step = [one for one in of("ddp", world) if one.what == "gradients"]
    assert step_bytes(step, world) == pytest.approx(2 * (world - 1) / world * 4 * 1800)


def test_micro_batches_cost_ddp_nothing_and_fsdp2_a_pass_each():
    one, three = (step_bytes(of("ddp", 4, micro_batches=count), 4) for count in (1, 3))
    assert one == three
    kinds = {one.what: len(one.pieces) for one in of("fsdp2", 4, micro_batches=3)}
    units = len(LAYER.units)  # three passes without gradient, and three with
    assert kinds["parameters, forward"] == 6 * units
    assert kinds["parameters, backward"] == kinds["gradients"] == 3 * units


def test_rows_that_do_not_divide_are_padded_in_what_fsdp2_sends_and_not_in_the_minimum():
    (forward, *_) = of("fsdp2", 8)
    rows = math.ceil(100 / 8) * 8
    assert sum(forward.pieces) == 4 * (rows * 10 + rows + 8 * 100)
    assert forward.needed == 4 * 1800


def test_what_has_one_row_is_sent_once_however_many_ranks():
    step = of("fsdp2", 512, [Network(units=(((1, 200, 1000), (512, 10)),))])
    assert step_bytes(step, 512) < 2 * 4 * 200_000 + 3 * 4 * 5120 + 1000


def test_zero_2_sums_on_every_rank_what_one_needs():
    step = [one for one in of("deepspeed", 4) if one.what in ("gradients", "parameters")]
    assert step_bytes(step, 4) == pytest.approx(1.5 * least_bytes(step, 4))


def test_zero_1_sums_micro_batches_before_it_sends_and_zero_2_cannot():
    first, second = (step_bytes(of("deepspeed", 4, zero_stage=stage, micro_batches=4), 4) for stage in (1, 2))
    assert second > 2 * first


def test_a_teacher_is_gathered_where_networks_are_in_parts_and_has_no_gradient():
    teacher = Network(LAYER.units, trained=False)
    assert step_bytes(of("ddp", 4, [LAYER, teacher]), 4) == step_bytes(of("ddp", 4), 4)
    more = step_bytes(of("fsdp2", 4, [LAYER, teacher]), 4) - step_bytes(of("fsdp2", 4), 4)
    assert more == pytest.approx(3 / 4 * sum(of("fsdp2", 4)[0].pieces))


@pytest.mark.parametrize("gloo", [True, False])
def test_batch_norm_of_a_teacher_is_not_in_the_backward_pass(gloo):
    student, teacher = Network((((8,),),), norms=(8,)), Network((((8,),),), norms=(8,), trained=False)
    found = {one.what: len(one.pieces) for one in of("ddp", 2, [student, teacher], gloo=gloo)}
    assert found["BatchNorm, forward"] == 2 * found["BatchNorm, backward"]


def test_embeddings_go_out_and_their_gradients_come_back():
    (out,) = [one for one in of("ddp", 4, gathered=50) if one.what == "embeddings"]
    (back,) = [one for one in of("ddp", 4, gathered=50) if one.what == "gradients of embeddings"]
    assert out.sent(4) == back.sent(4) == 3 * 50 * 4


def test_buckets_hold_every_gradient_once():
    layers = Network(units=tuple(((600_000 + 100_000 * i,),) for i in range(40)))
    buckets = ddp_buckets([layers])
    assert sum(buckets) == layers.bytes
    assert buckets[0] >= 1 << 20
    assert all(bucket >= 25 << 20 for bucket in buckets[1:-1])


def test_a_host_sends_as_much_as_one_of_its_gpus_would_alone():
    gradients = Exchange("gradients", "all_reduce", (1e9,))
    slow = {"within": math.inf, "between": 1e9}
    (eight,), (one,) = (Cluster(4, gpus, **slow).seconds(gradients) for gpus in (8, 1))
    assert eight == one == pytest.approx(2 * 3 / 4)


def test_what_runs_beside_a_computation_is_never_faster_than_the_longer_nor_slower_than_both():
    for pieces in ([0.5] * 4, [3.0], [0.1, 5.0, 0.1]):
        assert max(2.0, sum(pieces)) <= beside(2.0, pieces) <= 2.0 + sum(pieces)


def test_exchanges_that_wait_for_nothing_are_never_hidden():
    link = Cluster(2, 1, within=1.0, between=1.0)
    step = [Exchange("mean", "all_reduce", (1.0,))]
    assert step_seconds(step, link, 10.0, 20.0) == pytest.approx(31.0)
