"""Sub-classes of about equal size, by balanced k-means on the cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from medpretrain.data.counter import hash64, purpose
from medpretrain.losses.contrastive import unit

_SUBCLASSES = purpose("sub-classes")
_FAN = 32
"""Most parts that a set is split into at once; more are reached by splitting the parts again, so that the cost grows
with N log K and not with N x K."""
_ROUNDS = 10
"""Most times that the centres of the parts move."""


def balanced_subclasses(embeddings_ND: Tensor, labels_N: Tensor, *, smallest: int, seed: int) -> Tensor:
    """Splits every class into sub-classes about as large as its smallest class, of members that look alike.

    A class of n images has max(1, round(n / max(n_min, smallest))) of them, with sizes that differ by at most one (the
    balanced clustering of Hou et al. 2023).

    Args:
        embeddings_ND: any scale.
        labels_N: class ids, -1 where unknown.
        smallest: a sub-class aims at no fewer images, however small the smallest class.
        seed: of the first centres.

    Returns:
        (N,) int64, sub-class ids counted through all classes; -1 where the label is unknown.
    """
    # In float64 on the CPU, so that every rank finds the same.
    embeddings, labels = unit(embeddings_ND.double().cpu()), labels_N.cpu()
    found = torch.full_like(labels, -1)
    counts = torch.bincount(labels[labels >= 0])
    if not len(counts):
        return found.to(labels_N.device)
    size = max(int(counts[counts > 0].min()), smallest)
    subclasses = 0
    for label, count in enumerate(counts.tolist()):
        if not count:
            continue
        members = (labels == label).nonzero().squeeze(1)
        parts = max(1, round(count / size))
        draw = torch.Generator().manual_seed(int(hash64(seed, _SUBCLASSES, label) >> 1))
        found[members] = subclasses + balanced_kmeans(embeddings[members], parts, draw)
        subclasses += parts
    return found.to(labels_N.device)


def balanced_kmeans(x_ND: Tensor, parts: int, draw: torch.Generator) -> Tensor:
    """k-means on the cosine with parts of N // K or N // K + 1 members; N >= K.

    Args:
        x_ND: of length 1.
        parts: K.
        draw: for the members that are the first centres.

    Returns:
        (N,) int64, the part of each.
    """
    count = len(x_ND)
    part_sizes = torch.full((parts,), count // parts)
    part_sizes[: count % parts] += 1
    if parts <= _FAN:
        return _split(x_ND, part_sizes, draw)
    groups = part_sizes.tensor_split(_FAN)
    group = _split(x_ND, torch.stack([sizes.sum() for sizes in groups]), draw)
    found, first = torch.empty(count, dtype=torch.int64), 0
    for number, sizes in enumerate(groups):
        members = (group == number).nonzero().squeeze(1)
        found[members] = first + balanced_kmeans(x_ND[members], len(sizes), draw)
        first += len(sizes)
    return found


def _split(x_ND: Tensor, sizes_K: Tensor, draw: torch.Generator) -> Tensor:
    """k-means into parts of exactly these sizes, which sum to N."""
    centres = x_ND[torch.randperm(len(x_ND), generator=draw)[: len(sizes_K)]]
    found = _assign(x_ND @ centres.T, sizes_K)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, found, x_ND)
        before, found = found, _assign(x_ND @ unit(sums).T, sizes_K)
        if torch.equal(before, found):
            break
    return found


def _assign(similarity_NK: Tensor, sizes_K: Tensor) -> Tensor:
    """Greedily: each goes to the most similar centre that has room, and a centre takes the most similar first."""
    found = torch.full((len(similarity_NK),), -1)
    room = sizes_K.clone()
    left = torch.arange(len(similarity_NK))
    while len(left):  # in each round either all find a place or a centre fills up
        best, wish = similarity_NK[left].masked_fill(room == 0, -torch.inf).max(dim=1)
        order = best.argsort(descending=True, stable=True)
        order = order[wish[order].argsort(stable=True)]
        wished = torch.bincount(wish, minlength=len(room))
        turn = torch.arange(len(left)) - (wished.cumsum(dim=0) - wished)[wish[order]]
        taken = order[turn < room[wish[order]]]
        found[left[taken]] = wish[taken]
        room = room - torch.bincount(wish[taken], minlength=len(room))
        left = left[found[left] < 0]
    return found
