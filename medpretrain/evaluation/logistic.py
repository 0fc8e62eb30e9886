"""Multinomial logistic regression to its exact optimum, fast where features are correlated, as those of networks are.

Quasi-Newton methods stop early on such features: with the 512 features of an untrained ResNet-18 on 5,000 images
scikit-learn's lbfgs is 0.07 off in a score at its usual tolerance and 2e-5 at the tightest that ends. Newton steps
whose systems are solved by preconditioned conjugate gradients end at 1e-10 or better, in less time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import log_softmax, softmax

Array = NDArray[np.float64]

TOLERANCE = 1e-10
"""The largest entry of the gradient of the mean loss at which the optimum counts as reached."""
_NEWTON_STEPS = 100
_IN_FLOAT32 = 40  # of these; what is not there by then may need the digits
_CG_STEPS = 500
_PRECONDITIONER_ROWS = 8  # a feature: enough rows to know the curvature by
_LOOSEST, _TIGHTEST = 0.1, 1e-3  # how far a Newton system is solved; float32 carries three digits safely


@dataclass(frozen=True)
class Optimum:
    """Weights and how near the optimum they are."""

    weights_DK: Array
    """Of the features; their sum over the classes is 0."""
    bias_K: Array
    iterations: int
    """Newton steps."""
    gradient: float
    """The largest absolute entry of the gradient of the mean loss, in float64."""

    @property
    def converged(self) -> bool:
        return self.gradient <= TOLERANCE

    def scores(self, features_MD: Array) -> Array:
        """Probabilities (M, K)."""
        scores: Array = softmax(features_MD @ self.weights_DK + self.bias_K, axis=1)
        return scores


class Regression:
    """Logistic regression on N images, for any strength of its penalty.

    The minimum over W, b of sum_n -log softmax(x_n W + b)[y_n] + |W|^2 / (2 C), the bias free, as in scikit-learn; for
    two classes the penalty is that of scikit-learn's one weight vector w = W[1] - W[0], |w|^2 / (2 C).

    Args:
        features_ND: training features, finite, of about the same scale.
        labels_N: their classes, each of 0 to n_classes - 1 at least once.
        n_classes: K >= 2.
    """

    def __init__(self, features_ND: Array, labels_N: NDArray[np.integer], n_classes: int) -> None:
        n, d = features_ND.shape
        self._labels, self._k = labels_N, n_classes
        # The optimum is a combination of the images: with fewer of them than features, N coordinates hold it exactly.
        self._basis: Array | None = None
        if n < d:
            self._basis, upper = np.linalg.qr(features_ND.T)
            features_ND = upper.T
        self._x = np.concatenate([features_ND, np.ones((n, 1))], axis=1)
        # Curvature needs few digits, and memory is what it waits for; loss and gradient stay in float64.
        self._x32 = self._x.astype(np.float32)
        self._stride = max(1, n // (_PRECONDITIONER_ROWS * self._x.shape[1]))

    def fit(self, C: float, start: Optimum | None = None, *, tolerance: float = TOLERANCE) -> Optimum:
        """The optimum for one C, to a gradient of `tolerance`; `start`, for another C or less exact, saves steps."""
        n, d = self._x.shape
        penalty_D1 = np.full((d, 1), (2.0 if self._k == 2 else 1.0) / C)
        penalty_D1[-1] = 0.0
        w_DK = np.zeros((d, self._k)) if start is None else self._inner(start)
        z_NK = self._x @ w_DK
        loss = self._loss(z_NK, w_DK, penalty_D1)
        for step in range(_NEWTON_STEPS + 1):
            p_NK = softmax(z_NK, axis=1)
            residual_NK = p_NK.copy()
            residual_NK[np.arange(n), self._labels] -= 1.0
            gradient_DK = self._x.T @ residual_NK + penalty_D1 * w_DK
            size = float(np.abs(gradient_DK).max()) / n
            if size <= tolerance or step == _NEWTON_STEPS:
                break
            accuracy = min(_LOOSEST, max(_TIGHTEST, size**0.5))
            x_ND = self._x32 if step < _IN_FLOAT32 else self._x
            move_DK = self._newton_step(x_ND, gradient_DK, p_NK, penalty_D1, accuracy)
            z_move_NK, slope = self._x @ move_DK, float((gradient_DK * move_DK).sum())
            length = 1.0
            while length > 1e-6:
                tried = self._loss(z_NK + length * z_move_NK, w_DK + length * move_DK, penalty_D1)
                if tried <= loss + 1e-4 * length * slope + 1e-13 * abs(loss):  # the last for rounding, near the end
                    break
                length /= 2
            w_DK, loss = w_DK + length * move_DK, tried
            z_NK = self._x @ w_DK
        weights = w_DK[:-1] if self._basis is None else self._basis @ w_DK[:-1]
        return Optimum(weights, w_DK[-1], step, size)

    def _inner(self, start: Optimum) -> Array:
        weights = start.weights_DK if self._basis is None else self._basis.T @ start.weights_DK
        return np.concatenate([weights, start.bias_K[None]])

    def _loss(self, z_NK: Array, w_DK: Array, penalty_D1: Array) -> float:
        likely = log_softmax(z_NK, axis=1)[np.arange(len(z_NK)), self._labels].sum()
        return float(0.5 * (penalty_D1 * w_DK * w_DK).sum() - likely)

    def _newton_step(
        self, x_ND: NDArray[np.floating], gradient_DK: Array, p_NK: Array, penalty_D1: Array, accuracy: float
    ) -> Array:
        """H^-1 (-gradient) by conjugate gradients.

        H = sum_n (diag(p_n) - p_n p_n^T) (x) x_n x_n^T + penalty is preconditioned by the one Kronecker product that
        has its class and its feature part right on average: A (x) G + 1/C with A the mean of the class parts and G the
        Gram matrix weighted by their traces. With two classes it is H itself.
        """
        some = x_ND[:: self._stride]
        trace_N = np.maximum(1.0 - (p_NK * p_NK).sum(axis=1), 0.0)
        class_part = (np.diag(p_NK.sum(axis=0)) - p_NK.T @ p_NK) / max(trace_N.sum(), 1e-300)
        weighted = some * trace_N[:: self._stride, None].astype(x_ND.dtype)
        gram = (some.T @ weighted).astype(np.float64) * (len(trace_N) / len(some))
        a_K, of_classes = np.linalg.eigh(class_part)
        g_D, of_features = eigh(gram, driver="evd", overwrite_a=True)
        curvature_DK = (np.maximum(g_D, 0)[:, None] * np.maximum(a_K, 0) + penalty_D1[0]).astype(x_ND.dtype)
        q_DD, u_KK = of_features.astype(x_ND.dtype), of_classes.astype(x_ND.dtype)
        scale = float(np.abs(gradient_DK).max())  # near the optimum the gradient would leave float32's range
        residual = (-gradient_DK / scale).astype(x_ND.dtype)
        p_NK, penalty_D1 = p_NK.astype(x_ND.dtype), penalty_D1.astype(x_ND.dtype)

        def times_hessian(v_DK: NDArray[np.floating]) -> NDArray[np.floating]:
            z_NK = x_ND @ v_DK
            z_NK *= p_NK
            z_NK -= p_NK * z_NK.sum(axis=1, keepdims=True)
            product: NDArray[np.floating] = x_ND.T @ z_NK + penalty_D1 * v_DK
            return product

        def preconditioned(r_DK: NDArray[np.floating]) -> NDArray[np.floating]:
            result: NDArray[np.floating] = q_DD @ ((q_DD.T @ r_DK @ u_KK) / curvature_DK) @ u_KK.T
            return result

        found = np.zeros_like(residual)
        direction = step = preconditioned(residual)
        first = norm = float((residual * step).sum())
        for _ in range(_CG_STEPS):
            product = times_hessian(direction)
            bent = float((direction * product).sum())
            if not bent > 0:  # rounding took what curvature was left
                break
            alpha = norm / bent
            found += alpha * direction
            residual -= alpha * product
            step = preconditioned(residual)
            before, norm = norm, float((residual * step).sum())
            if norm <= accuracy**2 * first:
                break
            direction = step + (norm / before) * direction
        move: Array = found.astype(np.float64) * scale
        return move
