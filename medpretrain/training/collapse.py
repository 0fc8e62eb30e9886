"""Whether features still tell images apart: measures of a global batch, and an alarm when they fall.

All measures take features without gradient and compute in float64; one that is not finite gives NaN.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medpretrain.losses.gather import gather, world_size

_log = logging.getLogger(__name__)

IMAGES = 512
"""Images measured of a global batch: the cost of RankMe grows with the cube."""

# Untrained backbones of six families on 64 mammary, hand, retinal and mixed images have a feature std of 0.57 to 0.94,
# RankMe of 18 to 41, alignment above 0.5 and uniformity below -1.2.
FEATURE_STD = 0.05
ALIGNMENT, UNIFORMITY = 0.05, -0.05
"""Together: images differ as little as views of one do, by about 10 degrees. Two classes that have become two points at
right angles stay below -0.05 up to an imbalance of 38 to 1."""
RANKME, RANKME_PART = 4.0, 0.1
"""Dimensions, and part of the most there were, both not counting the one that constant features fill. Few alone are no
sign, for a batch of N images has at most N; nor is a fall alone, for untrained networks fill many."""


def of_global_batch(features_NVD: Tensor) -> Tensor:
    """The first two views of up to 512 images of all ranks, as many of each, in float32; a collective.

    Args:
        features_NVD: of this rank's images, as many on each rank.
    """
    return gather(features_NVD[: max(1, IMAGES // world_size()), :2].float())


def representation(features_NVD: Tensor) -> dict[str, float]:
    """What `of_global_batch` gives, measured: `feature_std`, `rankme` and `uniformity` of the first views, `alignment`.

    A measure that needs two images or two views is left out where there is one.

    >>> features_NVD = torch.eye(4).unsqueeze(1).expand(4, 2, 4)  # four images at right angles, both views alike
    >>> {name: round(value, 3) for name, value in representation(features_NVD).items()}
    {'feature_std': 0.866, 'rankme': 4.0, 'uniformity': -4.0, 'alignment': 0.0}
    """
    images, views, _ = features_NVD.shape
    first_ND = features_NVD[:, 0]
    measures: dict[str, Tensor] = {}
    if images > 1:
        measures = {
            "feature_std": feature_std(first_ND),
            "rankme": rankme(first_ND),
            "uniformity": uniformity(first_ND),
        }
    if views > 1:
        measures["alignment"] = alignment(first_ND, features_NVD[:, 1])
    if not measures:
        return {}
    return dict(zip(measures, torch.stack(list(measures.values())).tolist(), strict=True))  # one wait for the device


def feature_std(features_ND: Tensor) -> Tensor:
    """Mean standard deviation of unit-length features over images, times sqrt(D): about 1 when spread out, 0 when
    every image has the same feature."""
    unit_ND = F.normalize(features_ND.double(), dim=1)
    return unit_ND.std(dim=0, correction=0).mean() * unit_ND.shape[1] ** 0.5


def rankme(features_ND: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023): how many dimensions the features fill, from 1 to min(N, D).

    exp(-sum_k p_k log p_k) with p_k = s_k / sum_j s_j + 1e-7 over the singular values s. Of one batch it is lower than
    the paper's, which takes 25,600 images.
    """
    x_ND = features_ND.double()
    gram = x_ND @ x_ND.T if x_ND.shape[0] <= x_ND.shape[1] else x_ND.T @ x_ND
    known = gram.isfinite().all()  # eigenvalues of anything else are an error
    singular = torch.linalg.eigvalsh(torch.where(known, gram, 0.0)).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny) + 1e-7
    return torch.where(known, torch.exp(-(p * p.log()).sum()), math.nan)


def alignment(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """Mean |f1 - f2|^2 of two views of an image on the unit sphere (Wang & Isola 2020, alpha = 2): 0 to 4."""
    difference_ND = F.normalize(first_ND.double(), dim=1) - F.normalize(second_ND.double(), dim=1)
    return difference_ND.square().sum(dim=1).mean()


def uniformity(features_ND: Tensor) -> Tensor:
    """log of the mean of exp(-2 |fi - fj|^2) over pairs of images on the unit sphere (Wang & Isola 2020, t = 2).

    0 when all are alike, -4 when all are at right angles; N >= 2.
    """
    unit_ND = F.normalize(features_ND.double(), dim=1)
    products_NN = unit_ND @ unit_ND.T
    squares_N = products_NN.diagonal()
    distances_NN = (squares_N[:, None] + squares_N - 2 * products_NN).clamp(min=0)
    count = len(unit_ND)
    pairs = count * (count - 1) / 2
    return torch.exp(-2 * distances_NN).triu(diagonal=1).sum().div(pairs).log()


class CollapseAlarm:
    """Whether features are becoming the same for all images, from the rows of `metrics.jsonl` and nothing else.

    It is raised by a row with a feature std below 0.05; with alignment below 0.05 and uniformity above -0.05; or with
    RankMe - 1 below 4 and below a tenth of the highest so far. NaN counts as fallen, a missing measure does not.

    Args:
        causes: what the message says of the cure, `Method.collapse_causes`.
        by_rank: whether RankMe counts. It should not for methods that learn from labels: they end with about as many
            dimensions as there are classes.
        earlier: the rows of a resumed run.

    >>> alarm = CollapseAlarm("a lower optim.lr is the usual cure")
    >>> alarm.update({"step": 10, "feature_std": 0.7, "rankme": 31.0})
    ''
    >>> alarm.update({"step": 20, "feature_std": 0.31, "rankme": 1.8})
    'COLLAPSE: RankMe fell from 31 to 1.8; a lower optim.lr is the usual cure'
    """

    def __init__(self, causes: str, *, by_rank: bool = True, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._causes, self._by_rank, self._raised = causes, by_rank, False
        self._widest: dict[str, float] = {}
        for row in earlier:
            self._remember(row)

    def update(self, row: Mapping[str, Any]) -> str:
        """The alarm that a row raises, or an empty string; when one begins it is logged as a warning too."""
        self._remember(row)
        fallen = self._fallen(row)
        if not fallen:
            self._raised = False
            return ""
        alarm = f"COLLAPSE: {', '.join(self._fall(row, name) for name in fallen)}; {self._causes}"
        if not self._raised:
            _log.warning("step %d: %s", row["step"], alarm)
        self._raised = True
        return alarm

    def _remember(self, row: Mapping[str, Any]) -> None:
        for name in _SHOWN:
            value = row.get(name)
            if value is not None and not math.isnan(value):
                wider = min if name == "uniformity" else max
                self._widest[name] = wider(value, self._widest.get(name, value))

    def _fallen(self, row: Mapping[str, Any]) -> list[str]:
        """The measures that raise the alarm; comparisons are written so that NaN does."""
        std, rank, near, spread = (row.get(name) for name in _SHOWN)
        fallen = []
        if std is not None and not std >= FEATURE_STD:
            fallen.append("feature_std")
        if self._by_rank and rank is not None:
            most = self._widest.get("rankme", math.inf)
            if not rank - 1 >= min(RANKME, RANKME_PART * (most - 1)):
                fallen.append("rankme")
        if near is not None and spread is not None and not (near >= ALIGNMENT or spread <= UNIFORMITY):
            fallen += ["alignment", "uniformity"]
        return fallen

    def _fall(self, row: Mapping[str, Any], name: str) -> str:
        widest, now = self._widest.get(name), row[name]
        if widest is None or widest == now:
            return f"{_SHOWN[name]} is {now:.3g}"
        went = "rose" if name == "uniformity" else "fell"
        return f"{_SHOWN[name]} {went} from {widest:.3g} to {now:.3g}"


_SHOWN = {"feature_std": "feature std", "rankme": "RankMe", "alignment": "alignment", "uniformity": "uniformity"}
