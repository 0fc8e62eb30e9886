"""DDP, FSDP2 and ZeRO 0 to 3 train alike, and go on from each other's states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from medpretrain.methods import method_class
from medpretrain.training.strategies import refuse_strategy

pytestmark = pytest.mark.distributed
STRATEGIES = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
FOLLOWED = [
    "dino vit",
    "modan_mulsupcon resnet",
    "amimv vit micro_batches=2 checkpoint_activations=true plain_heads=true",
    "kcl resnet",
    "bcl vit",
    "supcon vit precision=bf16",
]
WORKER = Path(__file__).with_name("strategy_cases.py")


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory):
    """What each of two ranks found, and what one process alone did."""
    folder = tmp_path_factory.mktemp("strategies")
    follow = [f"follow {case}" for case in FOLLOWED]
    run_ranks([str(WORKER), str(folder), follow[0], "go_on", "skip", *follow[1:]], 2, timeout=500)
    run_ranks([str(WORKER), str(folder), "go_on ddp zero2 zero3"], 1, timeout=200)
    files = {"ranks": ["world2_rank0.pt", "world2_rank1.pt"], "alone": ["world1_rank0.pt"], "first": ["first.pt"]}
    return {name: [torch.load(folder / file) for file in group] for name, group in files.items()}


def same_losses(losses, expected, tolerance):
    for step, (one, other) in enumerate(zip(losses, expected, strict=True)):
        assert one == pytest.approx(other, rel=tolerance), step


def same_state(state, expected, tolerance):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        a, b = tensor.double(), expected[name].double()
        if (
            "qkv.bias" in name and tensor.ndim
        ):  # attention does not depend on the bias of keys: its gradient is rounding alone
            a, b = (torch.cat(one.tensor_split(3)[::2]) for one in (a, b))
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9, (name, (a - b).norm(), b.norm())


@pytest.mark.parametrize("case", FOLLOWED)
def test_strategies_train_as_ddp_does(case, found):
    tolerance = 2e-2 if "bf16" in case else 1e-3
    for rank in found["ranks"]:
        results = rank[f"follow {case}"]
        ddp = results["ddp"]
        assert {"ddp", "fsdp2", "zero2"} < results.keys()
        for one in results.values():
            same_losses(one["losses"], ddp["losses"], tolerance / 10)
            assert torch.allclose(one["embedded"].float(), ddp["embedded"].float(), rtol=tolerance, atol=tolerance / 10)
            same_state(one["end"], ddp["end"], tolerance)


def test_ranks_have_different_data(found):
    first, second = (rank["follow dino vit"]["ddp"]["losses"] for rank in found["ranks"])
    assert all(one[0] != other[0] and one[1] == other[1] for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_frozen_layer_is_not_touched_and_counts_no_steps(strategy, found):
    """Two of the first three steps are frozen for DINO's last layer."""
    state = found["ranks"][0]["follow dino vit"][strategy]["written"]
    steps = {name: value.item() for name, value in state.items() if name.endswith(".step")}
    frozen = steps.pop("optimizer.student_head.prototypes.step")
    assert frozen == 1
    assert set(steps.values()) == {3}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_is_read_by_other_strategies(strategy, found):
    for number, rank in enumerate(found["ranks"]):
        undisturbed = rank["follow dino vit"]["ddp"]["losses"][3:7]
        for source, went_on in rank["go_on"][strategy].items():
            same_losses(went_on["losses"], undisturbed, 1e-4)
            if source == strategy:
                assert went_on["losses"] == rank["follow dino vit"][strategy]["losses"][3:7]  # to the bit
            if number == 0:
                same_state(went_on["end"], rank["go_on"]["ddp"]["ddp"]["end"], 1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_state_of_two_processes_is_read_by_one(strategy, found):
    (alone,) = found["alone"]
    expected = found["ranks"][0]["go_on"]["ddp"]["ddp"]["end"]
    assert len(alone["go_on ddp zero2 zero3"][strategy]) >= 2
    for went_on in alone["go_on ddp zero2 zero3"][strategy].values():
        same_state(went_on["end"], expected, 2e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_nan_on_one_rank_leaves_no_trace(strategy, found):
    for rank in found["ranks"]:
        skipped, unbroken = rank["skip"][strategy]["skipped"], rank["skip"][strategy]["unbroken"]
        assert skipped["losses"] == unbroken["losses"]
        assert all(torch.equal(value, unbroken["end"][name]) for name, value in skipped["end"].items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "bcl", "zero_stage": 3}, "no whole parameters where the loss of bcl reads them"),
        ({"method": "supcon", "zero_stage": 3, "compile": True}, "train.compile does not see"),
        ({"method": "supcon", "zero_stage": 1, "channels_last": True}, "another order; use ddp"),
    ],
)
def test_what_zero_cannot_train_is_refused_by_name(options, said, exactness):
    chosen = exactness.recipe(backbone="vit", strategy="deepspeed", **options)
    with pytest.raises(UserError, match=said):
        refuse_strategy(chosen, method_class(options["method"]))


def test_parameters_alone_are_not_enough(found):
    """The comparison would see optimizer states that were not read."""
    (first,) = found["first"]
    state = first["ddp"]["written"]
    other = {name: torch.zeros_like(value) if ".exp_avg" in name else value for name, value in state.items()}
    with pytest.raises(AssertionError):
        same_state(other, state, 1e-3)
