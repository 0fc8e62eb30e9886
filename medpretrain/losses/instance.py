"""Contrast of images with each other, without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from medpretrain.losses.contrastive import Pairs, contrastive_loss
from medpretrain.losses.views import ViewPairs


def nt_xent(z_VND: Tensor, *, temperature: float, keys_VMD: Tensor | None = None, first: int = 0) -> Tensor:
    """NT-Xent over V views of N images, averaged over all anchors.

    Equation 1 of Chen et al. 2020 (SimCLR), for any number of views V >= 2: the other views are positives alike.

    Args:
        z_VND: embeddings, any scale.
        temperature: > 0.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, or a temperature that is not positive.

    >>> nt_xent(torch.eye(2).repeat(2, 1, 1), temperature=0.5).item()  # doctest: +ELLIPSIS
    0.2395...
    """
    pairs = ViewPairs.of(z_VND, keys_VMD, first)
    others = pairs.other_views_AP
    weight = torch.full(others.shape, 1 / others.shape[1], dtype=torch.float64, device=others.device)
    return contrastive_loss(
        pairs.anchors_AD,
        pairs.keys_KD,
        lambda rows: Pairs(weight[rows], others[rows]),
        temperature=temperature,
        own_A=pairs.own_A,
    )
