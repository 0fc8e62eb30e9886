"""Class-balanced sampling as a pure function of the step: classes of one label share every global batch equally."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from medpretrain.data.counter import hash64, purpose
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import Places, SampleSequence, WeightedOrder

_log = logging.getLogger(__name__)

_KEPT = purpose("kept")

How = Literal["over", "under"]


@dataclass(frozen=True, eq=False)
class BalancedOrder(SampleSequence):
    """Classes mixed by equal shares, each going through epochs of its own, as `WeightedOrder` mixes datasets.

    Args:
        seed: names the order.
        classes: of each class the places of its images in the split, ascending; at least one class.
        samples: N, the images of the split.
        epoch_images: how many images count as an epoch.
        global_batch: B, at least one image of each class.
    """

    seed: int
    classes: tuple[NDArray[np.int64], ...] = field(repr=False)
    samples: int
    epoch_images: int
    global_batch: int

    @classmethod
    def of(cls, labels_N: NDArray[np.int64], how: How, *, seed: int, global_batch: int) -> BalancedOrder:
        """The order for the class ids of a split's images, -1 where unknown: such an image is never seen.

        Args:
            how: `over` sees small classes more often, and an epoch is N images. `under` keeps of each class as many
                images as the smallest has, those of the smallest hashes, and an epoch is what is kept.
        """
        classes = [np.flatnonzero(labels_N == one) for one in np.unique(labels_N[labels_N >= 0])]
        if how == "over":
            return cls(seed, tuple(classes), len(labels_N), len(labels_N), global_batch)
        smallest = min(map(len, classes))
        lots = [np.argsort(hash64(seed, _KEPT, places), kind="stable")[:smallest] for places in classes]
        kept = tuple(np.sort(places[lot]) for places, lot in zip(classes, lots, strict=True))
        return cls(seed, kept, len(labels_N), smallest * len(kept), global_batch)

    @property
    def epoch_size(self) -> int:
        return self.epoch_images

    @property
    def times_N(self) -> NDArray[np.float64]:
        """How often each image of the split is seen in an epoch, on average."""
        times = np.zeros(self.samples)
        for places in self.classes:
            times[places] = self.epoch_images / (len(self.classes) * len(places))
        return times

    def at(self, position: NDArray[np.int64]) -> Places:
        epoch, number = self._mixed.at(position)
        return Places(epoch, self._places[number])

    @cached_property
    def _mixed(self) -> WeightedOrder:
        share = Fraction(1, len(self.classes))
        sizes = tuple((len(places),) for places in self.classes)
        return WeightedOrder(self.seed, (share,) * len(sizes), sizes, self.global_batch)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        return np.concatenate(self.classes)


def balanced_order(
    dataset: Mixture, label: str, how: How, *, split: str, seed: int, global_batch: int
) -> BalancedOrder:
    """The order in which a run sees the samples of a split, the classes of a label in equal shares.

    Raises:
        UserError: no such label; fewer than two classes with images; a class that would give less than one image to a
            batch, or one of its images twice.
    """
    ids = dataset.labels(label)[dataset.rows(split)]
    counts = np.bincount(ids[ids >= 0], minlength=1)
    present = np.flatnonzero(counts)
    if len(present) < 2:
        raise UserError(
            f"data.balance needs two classes of {label!r} with images, and split {split!r} has {len(present)}; give "
            "another data.balance.label"
        )
    smallest = present[np.argmin(counts[present])]
    most = int(counts[smallest]) * len(present)
    if not len(present) <= global_batch <= most:
        raise UserError(
            f"data.balance gives each of the {len(present)} classes of {label!r} {global_batch / len(present):.3g} "
            f"images of train.global_batch={global_batch}; it must be at least 1, and no more than the "
            f"{counts[smallest]} of {dataset.label_names(label)[smallest]!r}: take a train.global_batch from "
            f"{len(present)} to {most}"
        )
    order = BalancedOrder.of(ids, how, seed=seed, global_batch=global_batch)
    _log.info(
        "data.balance: %d of the %d images of split %r have no known label %r and are left out; of the others %d are "
        "seen, in %d classes of equal shares",
        *(np.count_nonzero(ids < 0), len(ids), split, label),
        *(sum(map(len, order.classes)), len(order.classes)),
    )
    return order
