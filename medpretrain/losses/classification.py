"""Cross-entropy of class logits, of one class an image or of many bits. A label of -1 is unknown and adds nothing.

Both give a sum for each sample, for what it is divided by is known of the global batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medpretrain.losses.contrastive import at_least_float32


def cross_entropy(
    logits_NC: Tensor, labels_N: Tensor, *, class_weights_C: Tensor | None = None, focusing: float = 0.0
) -> Tensor:
    """-alpha_y (1 - p_y)^gamma log p_y of each sample, p being the softmax of its logits: (N,).

    The focal loss, equation 5 of Lin et al. 2017 (4 without weights) for several classes; with gamma = 0 the weighted
    cross-entropy. Its mean over a batch is the sum over samples by the sum of the known labels' weights.

    Args:
        logits_NC: of any float type; computed in float32 or wider.
        labels_N: class ids, -1 where unknown: there loss and gradient are 0.
        class_weights_C: alpha >= 0; None: 1 for each class.
        focusing: gamma >= 0; the paper's 2.

    Raises:
        ValueError: a negative `focusing`.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -1])).tolist()  # log 4
    [1.3862943649291992, 0.0]
    """
    _refuse_negative(focusing)
    log_p_NC = torch.log_softmax(at_least_float32(logits_NC), dim=1)
    known, target_N1 = labels_N >= 0, labels_N.clamp(min=0)[:, None]
    log_p_N = log_p_NC.gather(1, target_N1)[:, 0]
    loss_N = -log_p_N
    if focusing:
        # log(1 - p_y) from the other classes: 1 - p_y loses all digits near 0, and its power's slope is infinite there.
        others_NC = log_p_NC.scatter(1, target_N1, torch.finfo(log_p_NC.dtype).min)
        loss_N = loss_N * torch.exp(focusing * torch.logsumexp(others_NC, dim=1))
    if class_weights_C is not None:
        loss_N = loss_N * class_weights_C.to(loss_N.dtype)[target_N1[:, 0]]
    return torch.where(known, loss_N, 0.0)


def binary_cross_entropy(
    logits_NC: Tensor, targets_NC: Tensor, *, positive_weights_C: Tensor | None = None, focusing: float = 0.0
) -> Tensor:
    """The sum over its known bits of -alpha_t (1 - p_t)^gamma log p_t of each sample: (N,).

    p_t is sigmoid(logit) where the bit is 1 and 1 - sigmoid(logit) where it is 0: each bit is a problem of its own.
    Equation 5 of Lin et al. 2017 (4 without weights). The mean is the sum over samples by the number of known bits.

    Args:
        logits_NC: of any float type; computed in float32 or wider.
        targets_NC: 1, 0, or -1 where unknown: there loss and gradient are 0.
        positive_weights_C: alpha >= 0 of a bit that is 1; of one that is 0 it is 1. None: 1 for both.
        focusing: gamma >= 0; the paper's 2.

    Raises:
        ValueError: a negative `focusing`.

    >>> round(binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1, 0, -1]])).item(), 4)  # 2 log 2
    1.3863
    """
    _refuse_negative(focusing)
    logits_NC = at_least_float32(logits_NC)
    positive = targets_NC == 1
    towards_NC = torch.where(positive, logits_NC, -logits_NC)  # the logit of the bit's own side
    loss_NC = -F.logsigmoid(towards_NC)
    if focusing:
        loss_NC = loss_NC * torch.exp(focusing * F.logsigmoid(-towards_NC))
    if positive_weights_C is not None:
        loss_NC = torch.where(positive, loss_NC * positive_weights_C.to(loss_NC.dtype), loss_NC)
    return torch.where(targets_NC >= 0, loss_NC, 0.0).sum(dim=1)


def share_of_the_mean(sums_N: Tensor, divisor: Tensor, part: float) -> Tensor:
    """What one of equal processes returns so that the mean over them is a mean over the global batch.

    Args:
        sums_N: of this process's samples.
        divisor: of the global batch, a scalar; where it is 0, so are all the sums.
        part: of the global batch that this process has, in (0, 1].
    """
    return sums_N.sum() / torch.where(divisor > 0, divisor, 1) / part


def inverse_frequency(counts: Sequence[int]) -> list[float]:
    """Weights N / (C n_c) of the C classes with images, of N images together; 0 for the others.

    >>> inverse_frequency([1, 3, 0])
    [2.0, 0.6666666666666666, 0.0]
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def effective_number(counts: Sequence[int], beta: float) -> list[float]:
    """Weights (1 - beta) / (1 - beta^n_c), scaled to C together for C classes with images; 0 for the others.

    Equation 2 of Cui et al. 2019: 1 for all at beta = 0, the inverse frequency as beta nears 1.

    Args:
        beta: in [0, 1); the paper's best are 0.9, 0.99, 0.999 and 0.9999, by dataset.

    >>> effective_number([1, 3, 0], 0.0)
    [1.0, 1.0, 0.0]
    """
    weights = [1 / (1 - beta**count) if count else 0.0 for count in counts]
    return [weight * sum(count > 0 for count in counts) / sum(weights) for weight in weights]


def _refuse_negative(focusing: float) -> None:
    if focusing < 0:
        raise ValueError(f"the focusing parameter must not be negative, and is {focusing}")
