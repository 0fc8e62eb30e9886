"""Ranks and micro-batches do to the long-tail methods what one process does with the global batch.

BCL's prototypes are made by parameters that its loss alone uses, and their labels are not known equally on the ranks.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("long_tail.py")


@pytest.fixture(scope="module")
def long_tail():
    spec = importlib.util.spec_from_file_location("long_tail", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_tail"] = module
    spec.loader.exec_module(module)
    return module


def same(found, expected, case):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{case} {name}: {text}"
        )


@pytest.mark.distributed
def test_two_ranks_with_two_micro_batches_train_as_one_process_does(tmp_path, run_ranks, long_tail):
    run_ranks([str(SCRIPT), str(tmp_path)], 2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert any("gradient prototypes" in name for name in ranks[0]["bcl", 2])
    for name in long_tail.METHODS:
        single = long_tail.after_two_steps(long_tail.ALONE, name)
        for micro_batches in (1, 2):
            for rank in range(2):
                same(ranks[rank][name, micro_batches], single, f"{name}, {micro_batches} micro-batches, rank {rank}")


@pytest.mark.parametrize("name", ["bcl", "paco", "sbc"])
def test_micro_batches_train_as_the_whole_batch_does(name, long_tail):
    single, parts = (long_tail.after_two_steps(long_tail.ALONE, name, micro_batches=count) for count in (1, 3))
    same(parts, single, name)
