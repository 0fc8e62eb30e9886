"""Linear probes trained by gradient descent on frozen features, as papers report them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from data_prep.errors import UserError, nearest
from medpretrain.evaluation.classifier import Training, epoch_order, first_linear, learning_rate, refuse_not_finite


class ProbeSetting(Training):
    """How a linear layer is trained. What a paper does not say has the default of its optimizer in torch."""

    standardise: bool = False
    """Subtract the training features' mean and divide by their deviation; no paper here says it does."""


AMIMV = ProbeSetting(
    name="amimv", optimizer="adamw", lr=0.005, schedule="cosine", epochs=100, batch=128, weight_decay=0.01
)
"""AMIMV-SSL, section 4.3. Silent about weight decay (torch's AdamW: 0.01) and about standardising (none)."""
MODAN = ProbeSetting(name="modan", optimizer="adam", lr=1e-4, schedule="step", epochs=10, batch=32, weight_decay=0.0)
"""ModAn-MulSupCon, Table 3: StepLR(5, 0.1). Silent about weight decay (torch's Adam: 0) and standardising (none)."""
SETTINGS = {setting.name: setting for setting in (AMIMV, MODAN)}


def probe_setting(name: str) -> ProbeSetting:
    """A published setting by its name.

    Raises:
        UserError: there is none.
    """
    if name not in SETTINGS:
        raise UserError(f"there is no setting {name!r} of a trained linear probe{nearest(name, SETTINGS)}")
    return SETTINGS[name]


def probe_scores(
    train_ND: NDArray[np.floating],
    labels_N: NDArray[np.integer],
    test_MD: NDArray[np.floating],
    n_classes: int,
    setting: ProbeSetting,
    *,
    seed: int,
    device: torch.device | str,
) -> NDArray[np.float64]:
    """Train a linear layer with cross-entropy on the training features; softmax scores (M, K) of the test features.

    First weights and the order of the batches are functions of the seed alone; the last batch of an epoch may be
    short. All is float32, but for the softmax.

    Args:
        train_ND: training features.
        labels_N: their classes, from 0 to n_classes - 1.
        test_MD: test features.
        n_classes: K >= 2.
        setting: how.
        seed: names first weights and order.
        device: where the layer is trained.

    Raises:
        UserError: no training image, features that are not finite.
        WorkFailed: the loss left the finite numbers.

    >>> x = np.repeat(np.eye(2, dtype=np.float32), 40, axis=0)
    >>> probe_scores(x, np.repeat([0, 1], 40), x[::40], 2, AMIMV, seed=0, device="cpu").argmax(axis=1).tolist()
    [0, 1]
    """
    for split, features in (("train", train_ND), ("test", test_MD)):
        if not np.isfinite(features).all():
            raise UserError(f"the features of {split} hold values that are not finite")
    if not len(train_ND):
        raise UserError("a linear probe needs at least one training image")
    x_ND = torch.from_numpy(np.ascontiguousarray(train_ND, np.float32)).to(device)
    t_MD = torch.from_numpy(np.ascontiguousarray(test_MD, np.float32)).to(device)
    if setting.standardise:
        mean, deviation = x_ND.double().mean(dim=0), x_ND.double().std(dim=0, correction=0)
        deviation = torch.where(deviation > 0, deviation, 1.0)
        x_ND, t_MD = (((part.double() - mean) / deviation).float() for part in (x_ND, t_MD))
    y_N = torch.from_numpy(labels_N.astype(np.int64)).to(device)
    layer = first_linear(x_ND.shape[1], n_classes, seed).to(device)
    with torch.enable_grad():
        _train(layer, x_ND, y_N, setting, seed)
    with torch.no_grad():
        # Row by row the same, however many there are: in float64 the order of a sum is far below what is written.
        scores: NDArray[np.float64] = layer.double()(t_MD.double()).softmax(dim=1).cpu().numpy()
    return scores


def _train(layer: nn.Linear, x_ND: Tensor, y_N: Tensor, setting: ProbeSetting, seed: int) -> None:
    kind = torch.optim.AdamW if setting.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(layer.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, fused=True)
    steps = -(-len(x_ND) // setting.batch)
    step = 0
    for epoch in range(setting.epochs):
        order = epoch_order(len(x_ND), seed, epoch).to(x_ND.device)
        x_epoch, y_epoch, total = x_ND[order], y_N[order], torch.zeros((), device=x_ND.device)
        for x, y in zip(x_epoch.split(setting.batch), y_epoch.split(setting.batch), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(setting, epoch, step, steps)
            optimizer.zero_grad()
            loss = functional.cross_entropy(layer(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
        refuse_not_finite(float(total), f"the {setting.name} probe", epoch, setting.lr)
