"""A trained probe is the plain training loop a paper means, with an order that any machine draws alike."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from data_prep.errors import UserError, WorkFailed
from medpretrain.evaluation.classifier import epoch_order, first_linear
from medpretrain.evaluation.probe import AMIMV, MODAN, ProbeSetting, probe_scores, probe_setting


def blobs(n: int, d: int = 16, k: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    return (np.eye(k, d)[labels] + rng.normal(size=(n, d))).astype(np.float32), labels, rng.normal(size=(40, d))


def test_the_settings_are_those_of_the_papers() -> None:
    said = {"name", "optimizer", "lr", "schedule", "epochs", "batch"}
    assert AMIMV.model_dump(include=said | {"warmup_epochs"}) == {
        "name": "amimv",
        "optimizer": "adamw",
        "lr": 0.005,
        "schedule": "cosine",
        "epochs": 100,
        "batch": 128,
        "warmup_epochs": 0,
    }
    assert MODAN.model_dump(include=said | {"step_epochs", "gamma"}) == {
        "name": "modan",
        "optimizer": "adam",
        "lr": 1e-4,
        "schedule": "step",
        "epochs": 10,
        "batch": 32,
        "step_epochs": 5,
        "gamma": 0.1,
    }


@pytest.mark.parametrize("setting", [AMIMV.model_copy(update={"epochs": 7}), MODAN], ids=["amimv", "modan"])
def test_scores_are_those_of_a_plain_loop_with_torchs_schedulers(setting: ProbeSetting) -> None:
    x, y, t = blobs(150)
    scores = probe_scores(x, y, t, 3, setting, seed=5, device="cpu")
    layer = first_linear(16, 3, 5)
    if setting.name == "amimv":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(layer.parameters(), lr=0.005)
        steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7 * 2)
    else:
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
        epochs = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    for epoch in range(setting.epochs):
        for places in epoch_order(150, 5, epoch).split(setting.batch):
            optimizer.zero_grad()
            functional.cross_entropy(layer(torch.from_numpy(x)[places]), torch.from_numpy(y)[places]).backward()
            optimizer.step()
            if setting.name == "amimv":
                steps.step()
        if setting.name == "modan":
            epochs.step()
    expected = layer(torch.from_numpy(t).float()).softmax(dim=1).detach().numpy()
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores.dtype == np.float64
    assert scores.sum(axis=1) == pytest.approx(1.0, abs=1e-12)


def test_a_seed_gives_the_same_bits_and_another_gives_others() -> None:
    x, y, t = blobs(90)
    first, second, other = (probe_scores(x, y, t, 3, MODAN, seed=seed, device="cpu") for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.allclose(first, other)


def test_torchs_global_generator_is_neither_read_nor_moved() -> None:
    x, y, t = blobs(60)
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), probe_scores(x, y, t, 3, MODAN, seed=0, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(probe_scores(x, y, t, 3, MODAN, seed=0, device="cpu"), first)


def test_the_number_of_threads_changes_no_score() -> None:
    x, y, t = blobs(300, d=128)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(probe_scores(x, y, t, 3, MODAN, seed=0, device="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_standardising_makes_scale_and_shift_irrelevant() -> None:
    x, y, t = blobs(100)
    setting = MODAN.model_copy(update={"standardise": True})
    x[:, 3] = t[:, 3] = 2.0
    plain = probe_scores(x, y, t, 3, setting, seed=0, device="cpu")
    assert probe_scores(x * 100 + 7, y, t * 100 + 7, 3, setting, seed=0, device="cpu") == pytest.approx(plain, abs=1e-4)
    assert not np.allclose(plain, probe_scores(x, y, t, 3, MODAN, seed=0, device="cpu"), atol=1e-3)


def test_fewer_images_than_a_batch_are_learned_from() -> None:
    x, y = np.eye(2, 4, dtype=np.float32), np.arange(2)
    assert probe_scores(x, y, x, 2, AMIMV, seed=0, device="cpu").argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize("where", ["train", "test"])
def test_features_that_are_not_finite_are_refused_by_split(where: str) -> None:
    x, y, t = blobs(30)
    (x if where == "train" else t)[2, 3] = np.nan
    with pytest.raises(UserError, match=f"features of {where} hold"):
        probe_scores(x, y, t, 3, MODAN, seed=0, device="cpu")


def test_a_loss_that_leaves_the_numbers_names_epoch_and_rate() -> None:
    x, y, t = blobs(30)
    wild = MODAN.model_copy(update={"lr": 1e30})
    with pytest.raises(WorkFailed, match=r"modan probe is not finite in epoch \d+ at a learning rate of 1e\+30"):
        probe_scores(x * 1e10, y, t, 3, wild, seed=0, device="cpu")


def test_no_training_image_and_an_unknown_setting_are_refused() -> None:
    x, y, t = blobs(30)
    with pytest.raises(UserError, match="at least one"):
        probe_scores(x[:0], y[:0], t, 3, MODAN, seed=0, device="cpu")
    with pytest.raises(UserError, match="did you mean 'amimv'"):
        probe_setting("amimvv")


def test_first_weights_have_torchs_distribution() -> None:
    layer, torchs = first_linear(400, 50, 0), nn.Linear(400, 50)
    assert float(layer.weight.detach().std()) == pytest.approx(float(torchs.weight.detach().std()), rel=0.03)
    assert float(layer.weight.detach().abs().max()) <= 400**-0.5
    assert len(torch.cat([layer.weight.flatten(), layer.bias]).unique()) > 50 * 395
