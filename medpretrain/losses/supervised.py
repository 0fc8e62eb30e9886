"""Contrast by labels. A label of -1 is unknown: such an image is pulled to its own other views alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medpretrain.losses.contrastive import Pairs, at_least_float32, contrastive_loss, unit
from medpretrain.losses.views import ViewPairs


def sup_con(
    z_VND: Tensor, labels_M: Tensor, *, temperature: float, keys_VMD: Tensor | None = None, first: int = 0
) -> Tensor:
    """SupCon: every other view of the same class is a positive, and their mean is outside the logarithm.

    Equation 2 (L_out) of Khosla et al. 2020.

    Args:
        z_VND: embeddings of V views of N images, any scale.
        labels_M: class ids of the global batch, -1 where unknown.
        temperature: T > 0; the paper's 0.07.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, or a temperature that is not positive.

    >>> same = sup_con(torch.ones(2, 2, 3), torch.tensor([0, 0]), temperature=0.07)
    >>> round(same.item(), 4)  # log 3: all four views alike
    1.0986
    """
    pairs = ViewPairs.of(z_VND, keys_VMD, first)
    labels_K = labels_M.repeat(pairs.views)
    dtype = at_least_float32(z_VND).dtype

    def same_class(rows: slice) -> Pairs:
        image = pairs.image_A[rows, None]
        positive = ((labels_M[image] == labels_K) & (labels_K >= 0)) | (image == pairs.image_K)
        return Pairs(positive.to(dtype) / (positive.sum(dim=1, keepdim=True) - 1))

    return contrastive_loss(pairs.anchors_AD, pairs.keys_KD, same_class, temperature=temperature, own_A=pairs.own_A)


def supervised_minority(
    z_VND: Tensor,
    labels_M: Tensor,
    *,
    minority: int,
    temperature: float,
    keys_VMD: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Supervised Minority: SupCon for the anchors of one class, NT-Xent for all others, averaged over all anchors.

    Equation 9 of Mildenberger et al. 2025. All other embeddings repel an anchor, whatever its class.

    Args:
        z_VND: embeddings of V views of N images, any scale.
        labels_M: class ids of the global batch, -1 where unknown.
        minority: the id of the class whose images attract each other.
        temperature: T > 0.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, or a temperature that is not positive.

    >>> z, labels = torch.randn(2, 4, 8), torch.tensor([0, 0, 1, 1])
    >>> hidden = torch.tensor([-1, -1, 1, 1])
    >>> loss = supervised_minority(z, labels, minority=1, temperature=0.07)
    >>> bool(loss == sup_con(z, hidden, temperature=0.07))
    True
    """
    # To SupCon an image of unknown class is one to be told apart from all others: NT-Xent.
    only_minority = labels_M.where(labels_M == minority, -1)
    return sup_con(z_VND, only_minority, temperature=temperature, keys_VMD=keys_VMD, first=first)


def supervised_prototypes(
    z_VND: Tensor,
    labels_M: Tensor,
    prototypes_CD: Tensor,
    *,
    temperature: float,
    threshold: float = 0.5,
    keys_VMD: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Supervised Prototypes: NT-Xent, and a pull to the prototype of its class on each anchor that is far from it.

    Equations 10 to 12 of Mildenberger et al. 2025, averaged over all anchors. Prototypes repel nothing: they stand in
    no denominator. So the loss may be negative.

    Args:
        z_VND: embeddings of V views of N images, any scale.
        labels_M: class ids of the global batch, -1 where unknown: such an image is pulled to no prototype.
        prototypes_CD: one a class, any scale; no gradient reaches them. A row of zeros is no prototype.
        temperature: T > 0.
        threshold: the cosine with its prototype up to which an anchor is pulled, in [-1, 1]; the paper's 0.5.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, a threshold outside [-1, 1], a temperature that is not positive.

    >>> z, prototype = torch.ones(2, 2, 3), torch.ones(1, 3)
    >>> far, near = (
    ...     supervised_prototypes(z, torch.zeros(2, dtype=int), p, temperature=1.0) for p in (-prototype, prototype)
    ... )
    >>> round(near.item(), 4)  # log 3, NT-Xent's: all four views alike, and at their prototype
    1.0986
    >>> round((far - near).item(), 4)  # -log(exp(-1) / (3 exp(1)))
    3.0986
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"the threshold is a cosine in [-1, 1], not {threshold}")
    pairs = ViewPairs.of(z_VND, keys_VMD, first)
    anchors, others, count = pairs.anchors_AD.detach(), pairs.other_views_AP, len(pairs.keys_KD)
    prototypes = unit(prototypes_CD.detach()).to(at_least_float32(z_VND).dtype)
    placed = prototypes.any(dim=1)
    log_share = prototypes.new_zeros(count + len(prototypes))
    log_share[count:] = -torch.inf

    def other_views_and_prototype(rows: slice) -> Pairs:
        label = labels_M[pairs.image_A[rows]]
        own = label.clamp(min=0)
        cosine = (unit(anchors[rows]) * prototypes[own]).sum(dim=1)
        pulled = (label >= 0) & placed[own] & (cosine <= threshold)
        key = torch.cat([others[rows], count + own[:, None]], dim=1)
        weight = torch.full(key.shape, 1 / others.shape[1], dtype=prototypes.dtype, device=key.device)
        weight[:, -1] = pulled
        return Pairs(weight, key, log_share)

    return contrastive_loss(
        pairs.anchors_AD,
        [pairs.keys_KD, prototypes],
        other_views_and_prototype,
        temperature=temperature,
        own_A=pairs.own_A,
    )


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
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be in (0, 1], not {threshold}")
    pairs = ViewPairs.of(z_VND, keys_VMD, first)
    labels = labels_ML.to(at_least_float32(z_VND).dtype)
    counts = labels.sum(dim=1)

    def jaccard_over_positives(rows: slice) -> Pairs:
        image = pairs.image_A[rows]
        both = labels[image] @ labels.T
        either = counts[image, None] + counts - both
        jaccard = torch.where(either > 0, both / either.clamp(min=1), 0.0)
        # Half-way rounding must not decide: 3/10 reaches 0.3.
        weights = torch.where(jaccard >= threshold - 1e-6, jaccard, 0.0)
        weights.scatter_(1, image[:, None], 1.0)
        positives = (weights > 0).sum(dim=1, keepdim=True) * pairs.views - 1
        return Pairs((weights / positives).repeat(1, pairs.views))

    return contrastive_loss(
        pairs.anchors_AD, pairs.keys_KD, jaccard_over_positives, temperature=temperature, own_A=pairs.own_A
    )


def multi_hot(ids: list[Tensor], sizes: list[int]) -> Tensor:
    """Label ids of several kinds, (M,) each and -1 where unknown, as one multi-hot matrix (M, sum of sizes).

    >>> multi_hot([torch.tensor([1, -1]), torch.tensor([0, 0])], [2, 2]).tolist()
    [[0, 1, 1, 0], [0, 0, 1, 0]]
    """
    columns = [F.one_hot(kind + 1, size + 1)[:, 1:] for kind, size in zip(ids, sizes, strict=True)]
    return torch.cat(columns, dim=1)
