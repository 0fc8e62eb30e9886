from __future__ import annotations

import secrets

import numpy as np
import pytest
from sklearn.metrics import log_loss

from data_prep.errors import UserError
from medpretrain.evaluation.linear import GRID, linear_scores


def blobs(rng: np.random.Generator, n: int, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, n - 3)])
    return np.eye(3, 8)[labels] + spread * rng.normal(size=(n, 8)), labels


def test_the_same_features_give_the_same_bits() -> None:
    rng = np.random.default_rng(7)
    (x, y), (v, w), (t, _) = blobs(rng, 90), blobs(rng, 40), blobs(rng, 30)
    first, second = (linear_scores(x, y, t, 3, val=(v, w)) for _ in range(2))
    assert np.array_equal(first.scores, second.scores)
    assert first.C == second.C


def test_separable_classes_are_separated() -> None:
    rng = np.random.default_rng(7)
    (x, y), (t, u) = blobs(rng, 60, 0.05), blobs(rng, 30, 0.05)
    probe = linear_scores(x, y, t, 3)
    assert (probe.scores.argmax(axis=1) == u).all()
    assert (probe.C, probe.chosen_on, probe.converged) == (1.0, "default", True)
    assert probe.scores.sum(axis=1) == pytest.approx(1.0)


def test_the_scale_of_a_feature_does_not_matter() -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    (x, y), (t, _) = blobs(rng, 90), blobs(rng, 30)
    scale = 10.0 ** rng.integers(-3, 4, 8)
    assert linear_scores(x * scale, y, t * scale, 3).scores == pytest.approx(linear_scores(x, y, t, 3).scores, abs=1e-3)


def test_C_is_the_best_of_the_grid_on_val() -> None:
    rng = np.random.default_rng(7)
    (x, y), (v, w) = blobs(rng, 60), blobs(rng, 300)
    chosen = linear_scores(x, y, v, 3, val=(v, w))
    losses = {}
    for c in GRID:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("medpretrain.evaluation.linear.DEFAULT_C", c)
            losses[c] = log_loss(w, linear_scores(x, y, v, 3).scores)
    assert chosen.chosen_on == "val"
    assert min(losses, key=losses.__getitem__) == chosen.C
    assert chosen.C < 1.0, "noisy features want a strong penalty; else this test shows nothing"


def test_a_constant_feature_is_harmless() -> None:
    rng = np.random.default_rng(7)
    (x, y), (t, _) = blobs(rng, 60), blobs(rng, 30)
    x[:, 0] = t[:, 0] = 4.0
    assert np.isfinite(linear_scores(x, y, t, 3).scores).all()


@pytest.mark.parametrize("where", ["train", "val", "test"])
def test_features_that_are_not_finite_are_refused_by_split(where: str) -> None:
    rng = np.random.default_rng(7)
    of = {split: blobs(rng, 30) for split in ("train", "val", "test")}
    of[where][0][3, 2] = np.inf
    with pytest.raises(UserError, match=f"of {where} hold"):
        linear_scores(*of["train"], of["test"][0], 3, val=of["val"])


def test_an_empty_val_split_is_refused() -> None:
    x, y = blobs(np.random.default_rng(7), 30)
    with pytest.raises(UserError, match="no labelled image"):
        linear_scores(x, y, x, 3, val=(x[:0], y[:0]))
