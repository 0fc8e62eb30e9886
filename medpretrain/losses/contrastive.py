"""One core for every contrastive loss: `-sum_p w_ap log softmax`, a block of anchors at a time.

Each objective is its rule for the pair weights. Anchors may be the part of a global batch that this process holds, and
keys all of it; how the keys came together is not known here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PairWeights = Callable[[Tensor], Tensor]
"""From anchor positions (a,) among the keys to the weights (a, K) of all pairs, already divided by their norm."""

_ROWS = 1024


def contrastive_loss(
    anchors_AD: Tensor, keys_KD: Tensor, position_A: Tensor, pair_weights: PairWeights, temperature: float
) -> Tensor:
    """L_a = -sum_p w_ap [ s_ap / T - log sum_{k != a} exp(s_ak / T) ], a value an anchor.

    Equation 1 of Khosla et al. 2020 with general weights. Blocks of anchors are recomputed in the backward pass, so
    memory grows with A + K and not with their product.

    Args:
        anchors_AD, keys_KD: embeddings of any scale; normalised here, in float32 or wider.
        position_A: where each anchor stands among the keys; that key is its own and is left out.
        pair_weights: the rule; what it gives a pair of an anchor with itself is ignored.
        temperature: T > 0.

    Returns:
        (A,) losses.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    anchors, keys = (F.normalize(_at_least_float32(x), dim=1) for x in (anchors_AD, keys_KD))

    def block(anchors_AD: Tensor, keys_KD: Tensor, position_A: Tensor) -> Tensor:
        own = torch.arange(len(keys_KD), device=keys_KD.device) == position_A[:, None]
        logits = (anchors_AD @ keys_KD.T / temperature).masked_fill(own, -torch.inf)
        log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
        weights = pair_weights(position_A).to(log_p.dtype).masked_fill(own, 0)
        return -(weights * log_p.masked_fill(own, 0)).sum(dim=1)

    if len(anchors) <= _ROWS:
        return block(anchors, keys, position_A)
    blocks = zip(anchors.split(_ROWS), position_A.split(_ROWS), strict=True)
    return torch.cat([checkpoint(block, some, keys, at, use_reentrant=False) for some, at in blocks])


def nt_xent(z_VND: Tensor, *, temperature: float, keys_VMD: Tensor | None = None, first: int = 0) -> Tensor:
    """NT-Xent over V views of N images, averaged over all anchors.

    Equation 1 of Chen et al. 2020 (SimCLR), for any number of views V >= 2.

    Args:
        z_VND: embeddings, any scale.
        temperature: > 0.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, or a temperature that is not positive.

    >>> nt_xent(torch.eye(2).repeat(2, 1, 1), temperature=0.5).item()  # doctest: +ELLIPSIS
    0.2395...
    """
    keys = z_VND if keys_VMD is None else keys_VMD
    views, images = keys.shape[:2]
    if views < 2:
        raise ValueError("NT-Xent needs at least two views of each image")
    image = torch.arange(images, device=keys.device).repeat(views)

    def own_other_views(position_A: Tensor) -> Tensor:
        return (image == image[position_A, None]) / (views - 1)

    return _mean_over_views(z_VND, keys, first, own_other_views, temperature)


def mul_sup_con(
    z_VND: Tensor,
    labels_ML: Tensor,
    *,
    temperature: float,
    threshold: float,
    keys_VMD: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """ModAn-MulSupCon: positives are pairs whose labels' Jaccard similarity reaches a threshold, weighted by it.

    Equation 3 of the ModAn-MulSupCon paper, divided by the number of positives |P(a)| and not by the sum of weights.
    The other views of the same image are always positives of weight 1, so an image without any label still has a
    finite loss: NT-Xent's.

    Args:
        z_VND: embeddings of V views of N images, any scale.
        labels_ML: multi-hot labels of the global batch of M images.
        temperature: T > 0; the paper's 0.07.
        threshold: tau in (0, 1]; the paper's 0.3.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, a threshold outside (0, 1], a temperature that is not positive.

    >>> labels = torch.tensor([[1, 0], [1, 0]])
    >>> same = mul_sup_con(torch.ones(2, 2, 3), labels, temperature=0.07, threshold=0.3)
    >>> round(same.item(), 4)  # log 3: all four views alike
    1.0986
    """
    keys = z_VND if keys_VMD is None else keys_VMD
    views, images = keys.shape[:2]
    if views < 2:
        raise ValueError("ModAn-MulSupCon needs at least two views of each image")
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be in (0, 1], not {threshold}")
    labels = labels_ML.to(_at_least_float32(keys).dtype)
    counts = labels.sum(dim=1)
    image = torch.arange(images, device=keys.device)

    def jaccard_over_positives(position_A: Tensor) -> Tensor:
        anchor = position_A % images
        both = labels[anchor] @ labels.T
        either = counts[anchor, None] + counts - both
        jaccard = torch.where(either > 0, both / either.clamp(min=1), 0.0)
        # Half-way rounding must not decide: 3/10 reaches 0.3.
        weights = torch.where(jaccard >= threshold - 1e-6, jaccard, 0.0)
        weights = weights.masked_fill(image == anchor[:, None], 1.0)
        positives = (weights > 0).sum(dim=1, keepdim=True) * views - 1
        return (weights / positives).repeat(1, views)

    return _mean_over_views(z_VND, keys, first, jaccard_over_positives, temperature)


def multi_hot(ids: list[Tensor], sizes: list[int]) -> Tensor:
    """Label ids of several kinds, (M,) each and -1 where unknown, as one multi-hot matrix (M, sum of sizes).

    >>> multi_hot([torch.tensor([1, -1]), torch.tensor([0, 0])], [2, 2]).tolist()
    [[0, 1, 1, 0], [0, 0, 1, 0]]
    """
    columns = [F.one_hot(kind + 1, size + 1)[:, 1:] for kind, size in zip(ids, sizes, strict=True)]
    return torch.cat(columns, dim=1)


def _mean_over_views(z_VND: Tensor, keys_VMD: Tensor, first: int, weights: PairWeights, temperature: float) -> Tensor:
    views, count = z_VND.shape[:2]
    images = keys_VMD.shape[1]
    view = torch.arange(views, device=z_VND.device)[:, None] * images
    position = (view + first + torch.arange(count, device=z_VND.device)).flatten()
    return contrastive_loss(z_VND.flatten(0, 1), keys_VMD.flatten(0, 1), position, weights, temperature).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
