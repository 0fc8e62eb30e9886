"""Contrast of images with each other, without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medpretrain.losses.contrastive import Pairs, contrastive_loss, unit
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


def info_nce(queries_AD: Tensor, keys: Tensor | Sequence[Tensor], positive_A: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE: the mean over queries of -log exp(q k+ / T) / sum_k exp(q k / T), the positive k+ among the keys.

    Equation 4 of van den Oord et al. 2018 with the cosine as score; equation 1 of Chen, Xie and He 2021 (MoCo v3).

    Args:
        queries_AD: embeddings, any scale.
        keys: embeddings, any scale; several tensors stand one after another.
        positive_A: (A,) int64, the place of each query's positive among the keys.
        temperature: T > 0.

    Raises:
        ValueError: a temperature that is not positive.

    >>> round(info_nce(torch.eye(2), torch.eye(2), torch.arange(2), temperature=1.0).item(), 4)  # log(1 + 1 / e)
    0.3133
    """
    weight = torch.ones(len(positive_A), 1, device=positive_A.device)
    return contrastive_loss(
        queries_AD, keys, lambda rows: Pairs(weight[rows], positive_A[rows, None]), temperature=temperature
    )


def relational(
    students_AD: Tensor, teachers_AD: Tensor, keys_KD: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """ReSSL: a student's relation to other images, as a softmax over keys, is to be that of its teacher.

    The mean over anchors of the cross-entropy -sum_k p_k log q_k with p = softmax_k(t k / T_t) of the teacher t and
    q = softmax_k(s k / T) of the student s (algorithm 1 of Zheng et al. 2021).

    Args:
        students_AD: embeddings, any scale; they alone have a gradient.
        teachers_AD: the teacher's embeddings of the same images.
        keys_KD: embeddings of other images, usually a queue.
        temperature: T > 0, the student's; the paper's 0.1.
        teacher_temperature: T_t > 0, lower, so that the target is sharper; the paper's 0.04.

    Raises:
        ValueError: a temperature that is not positive.

    >>> one, keys = torch.eye(2), torch.ones(3, 2)
    >>> round(relational(one, one, keys, temperature=0.1, teacher_temperature=0.04).item(), 4)  # log 3: all keys alike
    1.0986
    """
    if teacher_temperature <= 0:
        raise ValueError(f"the teacher's temperature must be positive, not {teacher_temperature}")
    keys, teachers = unit(keys_KD).detach(), unit(teachers_AD).detach() / teacher_temperature
    return contrastive_loss(
        students_AD,
        keys,
        lambda rows: Pairs((teachers[rows] @ keys.T).softmax(dim=1)),
        temperature=temperature,
    )
