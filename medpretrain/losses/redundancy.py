"""Losses of two views that know no negatives: redundancy reduction over the batch, and BYOL's regression."""

from __future__ import annotations

import torch
from torch import Tensor

from medpretrain.losses.contrastive import at_least_float32, unit


def barlow_twins(z1_MD: Tensor, z2_MD: Tensor, *, off_diagonal_weight: float, eps: float = 1e-5) -> Tensor:
    """Barlow Twins: the correlation of the two views' dimensions over the batch is pulled to the identity matrix.

    Equations 1 and 2 of Zbontar et al. 2021: sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2. The statistics are those
    of the M images given, so M must be the whole global batch.

    Args:
        z1_MD, z2_MD: embeddings of the two views, any scale, in the same order of images.
        off_diagonal_weight: lambda; the authors' 0.0051.
        eps: added to each variance, as by the BatchNorm in the authors' code; 0 is equation 1 to the letter. With it a
            dimension that does not vary has correlation 0 and a bounded gradient, where rounding noise would
            otherwise be blown up to a deviation of 1. A single image has a loss of D and no gradient.

    Raises:
        ValueError: the views differ in shape.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # two independent dimensions
    >>> round(barlow_twins(z, z, off_diagonal_weight=0.0051).item(), 4)
    0.0
    >>> round(barlow_twins(z, z.flip(1), off_diagonal_weight=0.0051).item(), 4)  # 2 + 2 lambda
    2.0102
    """
    _refuse_unlike(z1_MD, z2_MD)
    with torch.autocast(z1_MD.device.type, enabled=False):
        z1, z2 = (_standardised(z, eps) for z in (z1_MD, z2_MD))
        images = len(z1)
        on_diagonal = (1 - (z1 * z2).mean(dim=0)).square().sum()
        return on_diagonal + off_diagonal_weight * _off_diagonal_squares(z1, z2) / images**2


def vicreg(
    z1_MD: Tensor, z2_MD: Tensor, *, invariance: float, variance: float, covariance: float, eps: float = 1e-4
) -> Tensor:
    """VICReg: views agree, every dimension has a standard deviation of at least 1, and no two are correlated.

    Equation 6 of Bardes et al. 2022, with variances and covariances divided by M - 1 (equations 1 to 4). As in the
    authors' code, and not in equation 5, the squared distance of two views is a mean over dimensions too, and
    the hinge on the deviation is averaged over the two branches, while their covariance terms are summed. The
    statistics are those of the M images given, so M must be the whole global batch.

    Args:
        z1_MD, z2_MD: embeddings of the two views in the same order of images; their scale matters.
        invariance, variance, covariance: the weights lambda, mu and nu; the paper's 25, 25 and 1.
        eps: > 0, added to each variance under the root, so that a dimension that does not vary has a gradient (of 0).
            A single image counts as one without variance.

    Raises:
        ValueError: the views differ in shape.

    >>> z = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])  # wide and uncorrelated
    >>> vicreg(z, z, invariance=25, variance=25, covariance=1).item()
    0.0
    """
    _refuse_unlike(z1_MD, z2_MD)
    with torch.autocast(z1_MD.device.type, enabled=False):
        z1, z2 = at_least_float32(z1_MD), at_least_float32(z2_MD)
        images, width = z1.shape
        freedom = max(images - 1, 1)
        loss = invariance * (z1 - z2).square().mean()
        for z in (z1, z2):
            centred = z - z.mean(dim=0)
            deviation = (centred.square().sum(dim=0) / freedom + eps).sqrt()
            loss = loss + variance * (1 - deviation).relu().mean() / 2
            loss = loss + covariance * _off_diagonal_squares(centred, centred) / freedom**2 / width
        return loss


def byol(predictions_2ND: Tensor, targets_2ND: Tensor) -> Tensor:
    """BYOL: each view's prediction points where the other view's target does.

    Equation 2 of Grill et al. 2020, 2 - 2 cos, summed over both directions and averaged over N images.

    Args:
        predictions_2ND: of two views, any scale.
        targets_2ND: of the same views in the same order; no gradient reaches them.

    Raises:
        ValueError: another number of views than two.

    >>> views = torch.eye(2)[:, None]  # one image, its two views at a right angle
    >>> byol(views, views).item(), byol(views, views.flip(0)).item()
    (4.0, 0.0)
    """
    if len(predictions_2ND) != 2 or predictions_2ND.shape != targets_2ND.shape:
        shapes = f"{tuple(predictions_2ND.shape)} and {tuple(targets_2ND.shape)}"
        raise ValueError(f"BYOL needs predictions and targets of two views each, not of shapes {shapes}")
    cosine_2N = (unit(predictions_2ND) * unit(targets_2ND.detach()).flip(0)).sum(dim=-1)
    return (2 - 2 * cosine_2N).sum(dim=0).mean()


def _refuse_unlike(z1_MD: Tensor, z2_MD: Tensor) -> None:
    if z1_MD.shape != z2_MD.shape:
        raise ValueError(f"views of the same images have one shape, not {tuple(z1_MD.shape)} and {tuple(z2_MD.shape)}")


def _standardised(z_MD: Tensor, eps: float) -> Tensor:
    """Each dimension with mean 0 and (biased) standard deviation 1 over the images."""
    z = at_least_float32(z_MD)
    centred = z - z.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + eps).rsqrt()


def _off_diagonal_squares(a_MD: Tensor, b_MD: Tensor) -> Tensor:
    """The sum over i != j of (a^T b)_ij^2."""
    images, width = a_MD.shape
    if images < width:
        # |a^T b|^2 = tr(a a^T b b^T): two M x M matrices in the place of one D x D.
        gram_MM = a_MD @ a_MD.T
        every = (gram_MM * (gram_MM if b_MD is a_MD else b_MD @ b_MD.T)).sum()
    else:
        every = (a_MD.T @ b_MD).square().sum()
    return every - (a_MD * b_MD).sum(dim=0).square().sum()
