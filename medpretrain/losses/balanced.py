"""Contrast by labels of a long tail. A label of -1 is unknown: such an image is pulled to its own other views alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medpretrain.losses.contrastive import Pairs, at_least_float32, contrastive_loss
from medpretrain.losses.views import ViewPairs


def balanced_contrastive(
    z_VND: Tensor,
    labels_M: Tensor,
    prototypes_CD: Tensor,
    *,
    temperature: float,
    keys_VMD: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """BCL: each class has one prototype among the keys, and one share of every denominator, however many its keys.

    Zhu et al. 2022, balanced contrastive learning: class complement (prototypes as positives and keys) and class
    averaging (exp(s_ik / T) is divided by the number of keys of k's class that anchor i sees, itself left out). An
    image of unknown label is a class of its own, without a prototype.

    Args:
        z_VND: embeddings of V views of N images, any scale.
        labels_M: class ids of the global batch, -1 where unknown.
        prototypes_CD: one a class, any scale.
        temperature: T > 0.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, or a temperature that is not positive.

    >>> same = balanced_contrastive(torch.ones(2, 2, 3), torch.tensor([0, 1]), torch.ones(2, 3), temperature=0.07)
    >>> round(same.item(), 4)  # log 2: two classes that look alike
    0.6931
    """
    pairs = ViewPairs.of(z_VND, keys_VMD, first)
    classes, images = len(prototypes_CD), torch.arange(pairs.images, device=labels_M.device)
    class_M = torch.where(labels_M < 0, classes + images, labels_M)
    class_K = torch.cat([class_M.repeat(pairs.views), torch.arange(classes, device=labels_M.device)])
    dtype = at_least_float32(z_VND).dtype
    ones_K = torch.ones_like(class_K, dtype=dtype)
    counts = ones_K.new_zeros(classes + pairs.images).index_add_(0, class_K, ones_K)
    log_count_K, log_others_K = counts[class_K].log(), (counts[class_K] - 1).log()

    def same_class(rows: slice) -> Pairs:
        own_class = class_M[pairs.image_A[rows], None]
        same = own_class == class_K
        # A key of the anchor's class has at least the anchor beside it, so its count less one is not 0.
        return Pairs(same / (counts[own_class] - 1), log_share=-torch.where(same, log_others_K, log_count_K))

    return contrastive_loss(
        pairs.anchors_AD, [pairs.keys_KD, prototypes_CD], same_class, temperature=temperature, own_A=pairs.own_A
    )


def parametric_contrastive(
    query_ND: Tensor,
    keys: Sequence[Tensor],
    logits_NC: Tensor,
    labels_N: Tensor,
    labels_K: Tensor,
    own_key_N: Tensor,
    *,
    temperature: float,
    key_weight: float = 0.05,
    centre_weight: float = 1.0,
) -> Tensor:
    """PaCo: one softmax over keys and class centres, in which the own centre weighs more than the keys of the class.

    Cui et al. 2021, equations 5 to 7, with weights alpha = `key_weight` for each key of the same class and
    `centre_weight` for the class's centre, divided by their sum. A query of unknown label is pulled to its own key.

    Args:
        query_ND: embeddings, any scale.
        keys: embeddings of the global batch, then those of a queue; K in all.
        logits_NC: of the classes, log prior included; not divided by the temperature.
        labels_N, labels_K: class ids of queries and keys, -1 where unknown.
        own_key_N: where each query's other view stands among the keys.
        temperature: T > 0.

    Raises:
        ValueError: a temperature that is not positive.
    """
    keys_n, classes = len(labels_K), logits_NC.shape[1]
    places = torch.arange(keys_n, device=labels_K.device)
    class_C = torch.arange(classes, device=labels_K.device)
    dtype = at_least_float32(query_ND).dtype

    def class_and_centre(rows: slice) -> Pairs:
        label = labels_N[rows, None]
        positive = ((label == labels_K) & (labels_K >= 0)) | (own_key_N[rows, None] == places)
        weight = torch.cat([key_weight * positive.to(dtype), centre_weight * (label == class_C).to(dtype)], dim=1)
        return Pairs(weight / weight.sum(dim=1, keepdim=True))

    return contrastive_loss(
        query_ND, keys, class_and_centre, temperature=temperature, logits_AC=at_least_float32(logits_NC)
    )


def subclass_contrastive(
    z_VND: Tensor,
    labels_M: Tensor,
    subclasses_M: Tensor,
    *,
    temperature: float,
    class_weight: float | Tensor = 0.25,
    class_temperature: float | Tensor | None = None,
    keys_VMD: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """SBC: views of a sub-class attract each other, and then, where the own sub-class is left out, those of the class.

    Equation 4 of Hou et al. 2023 (subclass-balancing contrastive learning). In its second term the other images of
    the own sub-class are neither positives nor in the denominator; the other views of the same image are both.

    Args:
        z_VND: embeddings of V views of N images, any scale.
        labels_M: class ids of the global batch, -1 where unknown.
        subclasses_M: sub-class ids, each within one class; -1: the image is a sub-class of its own.
        temperature: T1 > 0, among sub-classes.
        class_weight: beta, of the second term.
        class_temperature: T2 > 0 of the second term; one, or (V * N,) of one for each anchor; None: T1.
        keys_VMD: embeddings of the global batch when z_VND is only its images first .. first + N.

    Raises:
        ValueError: fewer than two views, or a temperature that is not positive.

    >>> alike, labels = torch.ones(2, 2, 3), torch.tensor([0, 0])
    >>> same = subclass_contrastive(alike, labels, torch.tensor([0, 1]), temperature=0.1, class_weight=1.0)
    >>> round(same.item(), 4)  # twice log 3: all four views alike
    2.1972
    """
    pairs = ViewPairs.of(z_VND, keys_VMD, first)
    labels_K, subclasses_K = labels_M.repeat(pairs.views), subclasses_M.repeat(pairs.views)
    dtype = at_least_float32(z_VND).dtype

    def relations(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a key shows the anchor's image, another of its sub-class, another of its class."""
        image = pairs.image_A[rows, None]
        same_image = image == pairs.image_K
        sibling = (subclasses_M[image] == subclasses_K) & (subclasses_K >= 0) & ~same_image
        cousin = (labels_M[image] == labels_K) & (labels_K >= 0) & ~same_image & ~sibling
        return same_image, sibling, cousin

    def mean_over(positive: Tensor) -> Tensor:
        """The anchor itself is one of the positives here and not counted."""
        weight = positive.to(dtype)
        return weight / (weight.sum(dim=1, keepdim=True) - 1)

    def same_subclass(rows: slice) -> Pairs:
        same_image, sibling, _ = relations(rows)
        return Pairs(mean_over(same_image | sibling))

    def same_class(rows: slice) -> Pairs:
        same_image, sibling, cousin = relations(rows)
        left_out = torch.zeros_like(sibling, dtype=dtype).masked_fill(sibling, -torch.inf)
        return Pairs(mean_over(same_image | cousin), log_share=left_out)

    anchors, keys, own = pairs.anchors_AD, pairs.keys_KD, pairs.own_A
    second = temperature if class_temperature is None else class_temperature
    fine = contrastive_loss(anchors, keys, same_subclass, temperature=temperature, own_A=own)
    return fine + class_weight * contrastive_loss(anchors, keys, same_class, temperature=second, own_A=own)
