"""The gradient on several ranks, each with its own data, is that of one process with the global batch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("gradients.py")


@pytest.fixture(scope="module")
def gradients():
    spec = importlib.util.spec_from_file_location("gradients", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gradients"] = module
    spec.loader.exec_module(module)
    return module


def norm_ratio_and_cosine(found, expected):
    assert found.keys() == expected.keys()
    names = [name for name in found if not name.startswith("buffer") and name != "loss"]
    a, b = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected))
    return (a.norm() / b.norm()).item(), (a @ b / a.norm() / b.norm()).item()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_different_data_have_the_gradient_of_the_global_batch(world, tmp_path, run_ranks, gradients):
    run_ranks([str(SCRIPT), str(tmp_path)], world)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    for case in ranks[0]:
        single = gradients.gradients(gradients.ALONE, *case.split())
        for rank in range(world):
            ratio, cosine = norm_ratio_and_cosine(ranks[rank][case], single)
            assert abs(ratio - 1) < 1e-9, case
            assert abs(cosine - 1) < 1e-9, case
            for name, value in single.items():
                torch.testing.assert_close(
                    ranks[rank][case][name],
                    value,
                    rtol=1e-6,
                    atol=1e-9,
                    msg=lambda text, at=f"{case} {name}": f"{at}: {text}",
                )


@pytest.mark.parametrize("method", ["dino", "modan_mulsupcon", "amimv"])
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(method, micro_batches, gradients):
    """On a ViT: BatchNorm's statistics are a micro-batch's own, as documented. The projector of AMIMV has BatchNorm."""
    if method == "amimv":
        gradients.OPTIONS["amimv"] = {"projector": [8]}  # one bare linear layer
    single = gradients.gradients(gradients.ALONE, method, "vit")
    parts = gradients.gradients(gradients.ALONE, method, "vit", micro_batches=micro_batches)
    ratio, cosine = norm_ratio_and_cosine(parts, single)
    assert abs(ratio - 1) < 1e-9
    assert abs(cosine - 1) < 1e-9
    torch.testing.assert_close(parts["loss"], single["loss"])


def test_the_test_would_see_a_loss_of_the_local_batch_alone(gradients, monkeypatch):
    """Without the gather the gradient of a part is not that of the whole: the data are different enough to tell."""
    whole = gradients.gradients(gradients.ALONE, "modan_mulsupcon", "vit")
    monkeypatch.setattr(gradients, "IMAGES", 6)
    half = gradients.gradients(gradients.ALONE, "modan_mulsupcon", "vit")
    _, cosine = norm_ratio_and_cosine(half, whole)
    assert cosine < 0.999
