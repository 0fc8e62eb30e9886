"""The measures of collapse are those of the global batch; as a script, one rank that writes what it measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from medpretrain.training.collapse import of_global_batch, representation
from medpretrain.training.process import joined

IMAGES = 12


def features():
    torch.manual_seed(3)
    lift = torch.linspace(0.2, 3, IMAGES)[:, None, None]  # ranks differ in mean and scale
    return torch.randn(IMAGES, 3, 16) * lift + lift


@pytest.mark.distributed
def test_ranks_measure_the_global_batch(tmp_path, run_ranks):
    run_ranks([__file__, str(tmp_path)], 2)
    whole = representation(of_global_batch(features()))
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == whole
    assert representation(of_global_batch(features()[: IMAGES // 2])) != whole


if __name__ == "__main__":
    with joined("cpu") as process:
        part = features().chunk(process.world)[process.rank]
        found = representation(of_global_batch(part))
        (Path(sys.argv[1]) / f"rank{process.rank}.json").write_text(json.dumps(found))
