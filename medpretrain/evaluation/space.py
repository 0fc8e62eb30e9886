"""How a representation space is laid out: whether views of an image, and images of a class, lie together.

SAD, SAA, CAD, CAC and GPU are equations 1 to 5 of Mildenberger et al. 2025, "A tale of two classes: adapting supervised
contrastive learning to binary imbalanced datasets", section 3.1. Where the paper leaves room they are read so:

- Every view of an image is x in its turn, and each of the others x+; for two views that is the mean of both orders.
- Negative pairs are of views of different images, also for more than two views, where the W without {x, x+} of
  equation 2 would hold further views of the same image.
- binom(n + 1, 2) = n (n + 1) / 2 is the number of unordered pairs of n things, each with itself among them. CAD and
  GPU are means over these pairs, as the text says. Literally, with the double sum of equation 5, which takes each pair
  of two things twice, GPU would be log 2 for many identical features, where a mean is log 1. CAD sums over the views
  of a class, so its n is their number, not that of the images as printed: that would not be a mean.
- GPU is over one view of each image, x_k, k = 1 ... N: the first.
- A neighbourhood (CAC) is of the r = floor(5 %) nearest other views, at least one. Of views equally far at its border
  each counts in part, so that the order of the images does not matter.

All is computed in float64, some rows against all others at a time: memory grows with the number of views, not with
its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from medpretrain.evaluation.space_record import Histogram, SpaceMetrics
from medpretrain.training.collapse import alignment, feature_std, rankme

NEIGHBOURHOOD_PERCENT = 5
"""Of all views, in CAC."""
TIE = 1e-12
"""Squared distances on the unit sphere closer than this are equal: below what float32 features tell apart, above the
rounding of a product."""
BINS = 200
"""Of a histogram, up to an upper bound of the distances; empty ones at the end are left out."""

# Distances held at once: 2 ** 23 in float64 are 64 MiB, and there are a few arrays of that size.
_ELEMENTS = 2**23


def neighbourhood(views: int) -> int:
    """The views in a neighbourhood of CAC, of so many in all.

    >>> neighbourhood(400), neighbourhood(30)
    (20, 1)
    """
    return max(1, views * NEIGHBOURHOOD_PERCENT // 100)


def space_metrics(features_NVD: Tensor, labels_N: NDArray[np.integer]) -> SpaceMetrics:
    """The measures of V views of N images; what they mean is said of the fields, how they are read above.

    Args:
        features_NVD: any scale, on any device; taken at unit length.
        labels_N: the class of each image, from 0.

    Raises:
        UserError: fewer than two images; a feature that is not finite, or 0 in all dimensions.

    >>> features_NVD = torch.eye(4).unsqueeze(1).expand(4, 2, 4)  # four images at right angles, both views alike
    >>> measured = space_metrics(features_NVD, np.array([0, 0, 1, 1]))
    >>> measured.sad, measured.saa, round(measured.cad, 3), measured.cac
    (0.0, 1.0, 0.566, 1.0)
    """
    _check(features_NVD)
    images, views, dimensions = features_NVD.shape
    assert len(labels_N) == images, f"{len(labels_N)} labels of {images} images"
    unit_NVD = F.normalize(features_NVD.double(), dim=2)
    pairs = list(combinations(range(views), 2))
    saa, cad, cac = _over_views(unit_NVD.reshape(-1, dimensions), labels_N, views)
    gpu, uniformity = _spread(unit_NVD[:, 0])
    return SpaceMetrics(
        sad=_mean([(unit_NVD[:, a] - unit_NVD[:, b]).norm(dim=1).mean() for a, b in pairs]),
        saa=saa,
        cad=cad,
        cac=cac,
        gpu=gpu,
        alignment=_mean([alignment(unit_NVD[:, a], unit_NVD[:, b]) for a, b in pairs]),
        uniformity=uniformity,
        rankme=rankme(features_NVD[:, 0]).item(),
        feature_std=feature_std(unit_NVD[:, 0]).item(),
    )


def distance_histogram(features_NVD: Tensor, bins: int = BINS) -> Histogram:
    """Euclidean distances of all pairs of views, of one image (positive) and of two (negative).

    Figure 2a of the study of DINO with weak augmentation on retinal images: of the features as the backbone gives them,
    so the scale is the backbone's. Each pair is counted once.

    Raises:
        UserError: as `space_metrics`, but for features of 0, which have distances.

    >>> distance_histogram(torch.tensor([[[0.0], [1.0]], [[8.0], [8.0]]]), bins=4).negative
    [0, 0, 0, 4]
    """
    _check(features_NVD, zeros=True)
    images, views, dimensions = features_NVD.shape
    x_MD = features_NVD.double().reshape(-1, dimensions)
    x_MD = x_MD - x_MD.mean(dim=0)
    # No distance is above twice the largest from the mean. Identical features need some width too.
    bound = 2 * x_MD.norm(dim=1).max().item() or 1.0
    edges = torch.linspace(0, bound, bins + 1, dtype=torch.float64, device=x_MD.device)
    image_M = torch.arange(images, device=x_MD.device).repeat_interleave(views)
    counts_2B = torch.zeros(2, bins, dtype=torch.int64, device=x_MD.device)
    sums = [0.0, 0.0]
    for first, squares_mK in _squared_distances(x_MD, upper=True):
        once_mK = torch.ones_like(squares_mK, dtype=torch.bool).triu(diagonal=1)
        same_mK = image_M[first : first + len(squares_mK), None] == image_M[first:]
        for kind, chosen_mK in enumerate((once_mK & same_mK, once_mK & ~same_mK)):
            distances = squares_mK[chosen_mK].sqrt()
            sums[kind] += distances.sum().item()
            counts_2B[kind] += torch.bincount(torch.bucketize(distances, edges[1:-1], right=True), minlength=bins)
    used = int(counts_2B.sum(dim=0).nonzero().max()) + 1
    positive, negative = counts_2B[:, :used].tolist()
    return Histogram(
        edges=edges[: used + 1].tolist(),
        positive=positive,
        negative=negative,
        positive_mean=sums[0] / sum(positive) if views > 1 else None,
        negative_mean=sums[1] / sum(negative),
    )


def _check(features_NVD: Tensor, *, zeros: bool = False) -> None:
    images, views, _ = features_NVD.shape
    assert views, "no view"
    if images < 2:
        raise UserError(f"a space is measured between images, and there is {images}")
    if not features_NVD.isfinite().all():
        raise UserError("the features hold values that are not finite")
    empty = 0 if zeros else int((features_NVD == 0).all(dim=2).sum())
    if empty:
        raise UserError(
            f"{empty} of {images * views} features are 0 in all dimensions and have no place on the unit sphere: "
            "the network is dead for these images"
        )


def _mean(values: list[Tensor]) -> float | None:
    return torch.stack(values).mean().item() if values else None


def _squared_distances(x_MD: Tensor, *, upper: bool) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows: the first row, and the squared distances to all rows, or (`upper`) to those from the first on."""
    x_MD = x_MD - x_MD.mean(dim=0)  # moves nothing, and keeps the digits of features that lie close together
    squares_M = x_MD.square().sum(dim=1)
    rows = max(1, _ELEMENTS // len(x_MD))
    for first in range(0, len(x_MD), rows):
        begin = first if upper else 0
        block_mD = x_MD[first : first + rows]
        distances_mK = torch.mm(block_mD, x_MD[begin:].T).mul_(-2)
        distances_mK.add_(squares_M[first : first + rows, None]).add_(squares_M[begin:]).clamp_(min=0)
        distances_mK.diagonal(first - begin).zero_()
        yield first, distances_mK


def _over_views(unit_MD: Tensor, labels_N: NDArray[np.integer], views: int) -> tuple[float | None, float, float | None]:
    """SAA, CAD and CAC of M = N x V views, those of an image one after the other."""
    device, total = unit_MD.device, len(unit_MD)
    names, codes_N = np.unique(labels_N, return_inverse=True)  # a class without an image is no class here
    label_M = torch.from_numpy(codes_N).to(device).repeat_interleave(views)
    is_class_MC = F.one_hot(label_M, len(names)).double()
    image_M = torch.arange(total, device=device) // views
    near = neighbourhood(total)
    ahead = torch.zeros((), dtype=torch.int64, device=device)
    within_C = torch.zeros(len(names), dtype=torch.float64, device=device)
    agreeing = torch.zeros((), dtype=torch.float64, device=device)
    for first, squares_mM in _squared_distances(unit_MD, upper=False):
        mine = slice(first, first + len(squares_mM))
        label_m = label_M[mine]
        to_class_mC = squares_mM.sqrt() @ is_class_MC
        within_C.index_add_(0, label_m, to_class_mC.gather(1, label_m[:, None])[:, 0])
        squares_mM.diagonal(first).fill_(torch.inf)
        agreeing += _agreement(squares_mM, label_m[:, None] == label_M, near)
        own_mV = image_M[mine, None] * views + torch.arange(views, device=device)
        positive_mV = squares_mM.gather(1, own_mV)  # with itself, infinitely far
        negative_m1 = squares_mM.scatter_(1, own_mV, torch.inf).amin(dim=1, keepdim=True)
        ahead += (positive_mV < negative_m1 - TIE).sum()
    of_class_C = is_class_MC.sum(dim=0)
    # Each pair of two was met from both sides; a view has distance 0 to itself.
    cad = (within_C / 2 / (of_class_C * (of_class_C + 1) / 2)).mean().item()
    saa = ahead.item() / (total * (views - 1)) if views > 1 else None
    return saa, cad, agreeing.item() / total if len(names) > 1 else None


def _agreement(squares_mM: Tensor, same_mM: Tensor, near: int) -> Tensor:
    """The sum over rows of the part of the nearest views that have the row's own class."""
    border_m1 = squares_mM.kthvalue(near, dim=1, keepdim=True).values
    inside_mM = squares_mM < border_m1 - TIE
    tied_mM = (squares_mM <= border_m1 + TIE) & ~inside_mM
    left_m = near - inside_mM.sum(dim=1)
    part_m = (tied_mM & same_mM).sum(dim=1) / tied_mM.sum(dim=1).double()
    return (((inside_mM & same_mM).sum(dim=1) + left_m * part_m) / near).sum()


def _spread(unit_ND: Tensor) -> tuple[float, float]:
    """GPU and the uniformity of Wang & Isola 2020, both the log of the mean of exp(-t d^2) over unordered pairs: of
    t = 1 with each image's pair with itself, and of t = 2 without."""
    images = len(unit_ND)
    of_one, of_two = 0.0, 0.0
    for _, squares_mK in _squared_distances(unit_ND, upper=True):
        potential_mK = squares_mK.neg_().exp_()
        of_one += potential_mK.triu().sum().item()
        of_two += potential_mK.square_().triu(diagonal=1).sum().item()
    gpu = np.log(of_one / (images * (images + 1) / 2))
    return float(gpu), float(np.log(of_two / (images * (images - 1) / 2)))
