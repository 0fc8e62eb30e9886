"""Classify an image by its nearest neighbours among the training images, weighted by similarity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from data_prep.errors import UserError

# Similarities held at once: 2 ** 24 in float64 are 128 MiB.
_CHUNK_ELEMENTS = 2**24


def knn_scores(
    train_ND: Tensor,
    labels_N: Tensor,
    test_MD: Tensor,
    n_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.07,
) -> Tensor:
    """Class scores (M, n_classes), float64, each row summing to 1.

    Weighted kNN of Wu et al. 2018 (section 3.4), as DINO evaluates: of the k training images of the highest cosine
    similarity s, each votes for its class with weight exp(s / temperature). Similarities are taken in float64; of
    equally similar images at the k-th place the ones of the lower row are in, so the result depends on no chunk size.

    Args:
        train_ND: training features, any scale.
        labels_N: their classes, from 0 to n_classes - 1.
        test_MD: test features, on the same device.
        n_classes: K.
        k: neighbours; more than N means all N.
        temperature: > 0.

    Raises:
        UserError: no training image, k or temperature not positive, features that are not finite.

    >>> knn_scores(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), 2, k=1)
    tensor([[1., 0.]], dtype=torch.float64)
    """
    if k < 1:
        raise UserError(f"kNN needs at least one neighbour; k is {k}")
    if not temperature > 0:
        raise UserError(f"the temperature of kNN must be positive; it is {temperature}")
    if not len(train_ND):
        raise UserError("kNN needs at least one training image")
    if not (torch.isfinite(train_ND).all() and torch.isfinite(test_MD).all()):
        raise UserError("the features hold values that are not finite")
    k = min(k, len(train_ND))
    train_ND = functional.normalize(train_ND.double(), dim=1)
    test_MD = functional.normalize(test_MD.double(), dim=1)
    votes_NK = functional.one_hot(labels_N.long(), n_classes).double()
    rows = max(1, _CHUNK_ELEMENTS // len(train_ND))
    scores = [_vote(chunk @ train_ND.T, votes_NK, k, temperature) for chunk in test_MD.split(rows)]
    return torch.cat(scores) if scores else votes_NK.new_zeros(0, n_classes)


def _vote(similarity_mN: Tensor, votes_NK: Tensor, k: int, temperature: float) -> Tensor:
    best_m1 = similarity_mN.amax(dim=1, keepdim=True)
    last_m1 = similarity_mN.topk(k, dim=1).values[:, -1:]
    above = similarity_mN > last_m1
    tied = similarity_mN == last_m1
    places_m1 = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= places_m1))
    # Relative to the best neighbour: the same after normalisation, and no overflow at a small temperature.
    weight_mN = torch.where(chosen, ((similarity_mN - best_m1) / temperature).exp(), 0.0)
    scores_mK = weight_mN @ votes_NK
    return scores_mK / scores_mK.sum(dim=1, keepdim=True)
