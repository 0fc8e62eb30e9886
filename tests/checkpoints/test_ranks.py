"""Checkpoints of several processes: any number reads what any number wrote; none waits for one that failed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from medpretrain.checkpoints import FolderTarget, load, read, verify

from .conftest import ALONE

SCRIPT = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("checkpoint_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


@pytest.mark.distributed
def test_any_number_of_processes_and_any_strategy_read_what_others_wrote(run_ranks, tmp_path):
    run_ranks([str(SCRIPT), "save_in_every_way,load_in_every_way", str(tmp_path)], 3)
    run_ranks([str(SCRIPT), "load_in_every_way", str(tmp_path)], 2)
    target = FolderTarget(tmp_path / "way")
    assert len(list((target.folder / "step-00000001").glob("rank-*-of-00003.safetensors"))) == 3
    for step, how in enumerate(ranks.HOW, 1):
        found = verify(target, f"step-{step:08d}")
        assert (found.info.world_size, found.info.extra) == (3, {"how": how})
        expected = ranks.tensors(step)
        assert all(torch.equal(value, expected[name]) for name, value in read(found).items())
        filled = {name: torch.zeros_like(value) for name, value in expected.items()}
        load(found, ranks.parts(filled, "copied", 0, 1), ALONE)
        assert all(torch.equal(filled[name], value) for name, value in expected.items())


@pytest.mark.distributed
def test_an_error_of_one_process_is_known_to_all_and_a_lost_one_holds_nobody(run_ranks, tmp_path):
    run_ranks([str(SCRIPT), "errors_reach_every_process,a_process_is_lost", str(tmp_path)], 2)
