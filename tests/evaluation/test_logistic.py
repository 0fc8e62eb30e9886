"""The optimum is the one an independent solver ends at, and its gradient is what is said of it."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from medpretrain.evaluation.logistic import TOLERANCE, Regression


def correlated(n: int, d: int, k: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features whose directions differ in size by 1e4, as those of networks do; rank < d: some are copies."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    rank = rank or d
    mixing = rng.normal(size=(rank, d)) * np.logspace(0, -4, rank)[:, None]
    hidden = rng.normal(size=(n + 50, rank))
    hidden[:n, :k] += 0.7 * np.eye(k, min(k, rank))[labels] if rank >= k else 0.0
    features = hidden @ mixing
    features /= features[:n].std(axis=0)
    return features[:n], labels, features[n:]


def reference(x: np.ndarray, y: np.ndarray, k: int, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method with the whole Hessian of the softmax in plain loops; the gauge by a pseudo-inverse."""
    n, d = x.shape
    x1 = np.concatenate([x, np.ones((n, 1))], axis=1)
    penalty = np.tile(np.append(np.full(d, 1 / c), 0.0), k)
    theta = np.zeros(k * (d + 1))
    for _ in range(60):
        p = softmax(x1 @ theta.reshape(k, -1).T, axis=1)
        gradient = ((p - np.eye(k)[y]).T @ x1).ravel() + penalty * theta
        hessian = np.diag(penalty)
        for i in range(k):
            for j in range(k):
                weight = p[:, i] * ((i == j) - p[:, j])
                hessian[i * (d + 1) : (i + 1) * (d + 1), j * (d + 1) : (j + 1) * (d + 1)] += (x1.T * weight) @ x1
        move = -np.linalg.lstsq(hessian, gradient, rcond=1e-14)[0]

        def loss(t: np.ndarray) -> float:
            likely = log_softmax(x1 @ t.reshape(k, -1).T, axis=1)[np.arange(n), y].sum()
            return float(0.5 * (penalty * t * t).sum() - likely)

        length, before = 1.0, loss(theta)
        while loss(theta + length * move) > before + 1e-9 and length > 1e-8:
            length /= 2
        theta = theta + length * move
        if np.abs(move).max() < 1e-12:
            break
    weights = theta.reshape(k, -1)
    return weights[:, :-1], weights[:, -1]


@pytest.mark.parametrize("c", [0.001, 1.0, 10.0])
@pytest.mark.parametrize(("n", "d", "k"), [(300, 20, 3), (200, 12, 5), (40, 60, 3)])
def test_scores_are_those_of_newtons_method_with_the_whole_hessian(n: int, d: int, k: int, c: float) -> None:
    x, y, t = correlated(n, d, k)
    optimum = Regression(x, y, k).fit(c)
    weights, bias = reference(x, y, k, c)
    assert optimum.converged
    assert optimum.scores(t) == pytest.approx(softmax(t @ weights.T + bias, axis=1), abs=1e-6)


@pytest.mark.parametrize("c", [0.01, 1.0])
@pytest.mark.parametrize(("n", "d"), [(300, 20), (30, 50)])
def test_two_classes_have_scikit_learns_penalty(n: int, d: int, c: float) -> None:
    x, y, t = correlated(n, d, 2)
    expected = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=200).fit(x, y).predict_proba(t)
    assert Regression(x, y, 2).fit(c).scores(t) == pytest.approx(expected, abs=1e-6)


def test_scipys_lbfgs_comes_to_the_same_loss() -> None:
    x, y, _ = correlated(120, 6, 3)

    def loss(theta: np.ndarray) -> float:
        weights = theta.reshape(3, 7)
        z = x @ weights[:, :6].T + weights[:, 6]
        return float(0.5 * (weights[:, :6] ** 2).sum() / 0.1 - log_softmax(z, axis=1)[np.arange(len(y)), y].sum())

    found = minimize(loss, np.zeros(21), method="L-BFGS-B", options={"maxfun": 100_000, "ftol": 1e-13})
    optimum = Regression(x, y, 3).fit(0.1)
    own = loss(np.concatenate([optimum.weights_DK.T, optimum.bias_K[:, None]], axis=1).ravel())
    assert own <= found.fun + 1e-9
    assert own == pytest.approx(found.fun, rel=1e-6)


def test_the_gradient_that_is_reported_is_that_of_the_mean_loss() -> None:
    x, y, _ = correlated(150, 10, 4)
    optimum = Regression(x, y, 4).fit(1.0)
    residual = optimum.scores(x) - np.eye(4)[y]
    gradient = np.concatenate([residual.T @ x + optimum.weights_DK.T / 1.0, residual.sum(axis=0)[:, None]], axis=1)
    assert np.abs(gradient).max() / len(x) <= 2 * TOLERANCE
    assert optimum.gradient <= TOLERANCE


def test_a_start_changes_the_steps_and_not_the_scores() -> None:
    x, y, t = correlated(400, 30, 4)
    regression = Regression(x, y, 4)
    cold = regression.fit(1.0)
    warm = regression.fit(1.0, start=regression.fit(0.1))
    assert warm.iterations <= cold.iterations
    assert regression.fit(1.0, start=cold).iterations == 0
    assert warm.scores(t) == pytest.approx(cold.scores(t), abs=1e-7)


def test_copies_of_a_feature_and_separable_classes_are_no_trouble() -> None:
    x, y, _ = correlated(200, 40, 3, rank=5)
    assert Regression(x, y, 3).fit(10.0).converged
    x[np.arange(200), y] += 10.0
    optimum = Regression(x, y, 3).fit(10.0)
    assert optimum.converged
    assert (optimum.scores(x).argmax(axis=1) == y).all()


def test_features_of_very_different_scales_still_end_at_the_optimum() -> None:
    x, y, _ = correlated(200, 10, 3)
    x[np.arange(200), y] += 1000.0
    optimum = Regression(x, y, 3).fit(10.0)
    assert optimum.gradient < 1e-7, "digits of x beyond float32 are needed here, and used"


def test_what_did_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = correlated(300, 20, 3)
    monkeypatch.setattr("medpretrain.evaluation.logistic._NEWTON_STEPS", 2)
    optimum = Regression(x, y, 3).fit(1.0)
    assert not optimum.converged
    assert optimum.gradient > TOLERANCE
