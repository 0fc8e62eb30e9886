"""Several prepared datasets as one; a single one is a mixture of one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import Dataset
from data_prep.errors import UserError, nearest
from data_prep.labels import UNKNOWN
from medpretrain.data.order import Order, SampleSequence, WeightedOrder
from medpretrain.data.patients import patients, some_patients

_log = logging.getLogger(__name__)

_LUMA = np.array([0.299, 0.587, 0.114])


class Mixture:
    """What a stream needs of its datasets. Rows are numbered through all of them, in their order.

    Args:
        datasets: at least one, all of one bit depth, none twice.
        weights: how the global batch is shared among the datasets, in any unit; without them each image of each dataset
            is seen once an epoch.
        fraction: percent of the patients of each dataset; of any split, what is here are the images of those.

    Attributes:
        datasets: as given.
        sha256: the identity of each.
        bit_depth: 8 or 16.
        sizes: (N, 2) int32, height and width.

    Raises:
        UserError: two datasets differ in bit depth, or are the same.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float] = (), fraction: float = 100.0) -> None:
        assert len(weights) in (0, len(datasets))
        first = datasets[0]
        seen: dict[str, Dataset] = {}
        for dataset in datasets:
            if dataset.bit_depth != first.bit_depth:
                raise UserError(
                    f"{first.path} has images of {first.bit_depth} bits and {dataset.path} of {dataset.bit_depth}: one "
                    "backbone sees one bit depth; train on one of them, or prepare both alike"
                )
            if dataset.sha256 in seen:
                raise UserError(
                    f"{seen[dataset.sha256].path} and {dataset.path} are the same dataset; data.weights say how often "
                    "one is seen"
                )
            seen[dataset.sha256] = dataset
        self.datasets = tuple(datasets)
        self.sha256 = tuple(dataset.sha256 for dataset in datasets)
        self.bit_depth = first.bit_depth
        self.sizes: NDArray[np.int32] = np.concatenate([dataset.sizes for dataset in datasets])
        # The decimals a user wrote: ten images of a hundred are exactly 0.1 of them, which no binary number is.
        self._weights = [Fraction(repr(weight)) for weight in weights]
        self._fraction = fraction
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])

    @classmethod
    def open(cls, paths: Sequence[str | Path], weights: Sequence[float] = (), fraction: float = 100.0) -> Mixture:
        """Open the datasets in some folders.

        Raises:
            UserError: one of them is no whole dataset, or they cannot be mixed.
        """
        if len(paths) == 1 and "," in str(paths[0]) and not Path(paths[0]).exists():
            raise UserError(f"there is no dataset {paths[0]}; several are a list, as in data.path=[{paths[0]}]")
        return cls([Dataset.open(path, share=len(paths)) for path in paths], weights, fraction)

    def __str__(self) -> str:
        return ", ".join(str(dataset.path) for dataset in self.datasets)

    @property
    def splits(self) -> dict[str, int]:
        """The images of each split, all datasets together and all of their patients."""
        counts = Counter[str]()
        for dataset in self.datasets:
            counts.update(dataset.info.splits)
        return dict(counts)

    def rows(self, split: str) -> NDArray[np.int64]:
        """The rows of a split, ascending.

        Raises:
            UserError: a dataset has no images in it.
        """
        parts = zip(self._starts[:-1], self.datasets, strict=True)
        return np.concatenate([start + self._rows(dataset, split) for start, dataset in parts])

    def _rows(self, dataset: Dataset, split: str) -> NDArray[np.int64]:
        rows = dataset.rows(split)
        return rows if self._fraction == 100 else rows[some_patients(patients(dataset)[rows], self._fraction)]

    def shares(self, split: str) -> list[Fraction]:
        """The part of each dataset in what a run sees: its weight or, without weights, its part of the images."""
        parts = self._weights or [Fraction(len(self._rows(dataset, split))) for dataset in self.datasets]
        return [part / sum(parts) for part in parts]

    def order(self, split: str, *, seed: int, global_batch: int, block_shards: int = 0) -> SampleSequence:
        """The order in which a run sees the samples of a split; they are places in `rows(split)`.

        Raises:
            UserError: no such split; a dataset that would give an image twice to a batch, or less than one.
        """
        shard_sizes = [_shard_sizes(dataset, self._rows(dataset, split)) for dataset in self.datasets]
        images = [sum(sizes) for sizes in shard_sizes]
        if sum(images) < global_batch:
            raise UserError(
                f"train.global_batch={global_batch} is more than the {sum(images)} samples of {self._part(split)} in "
                f"{self}; take a smaller one"
            )
        if not self._weights:
            flat = tuple(size for sizes in shard_sizes for size in sizes)
            return Order(seed, len(self.rows(split)), flat, block_shards)
        shares = self.shares(split)
        for dataset, share, has in zip(self.datasets, shares, images, strict=True):
            if not 1 <= share * global_batch <= has:
                raise UserError(
                    f"data.weights give {dataset.path} {float(share * global_batch):.3g} images of "
                    f"train.global_batch={global_batch}; it must be at least 1, and no more than the {has} in its "
                    f"{self._part(split)}"
                )
        return WeightedOrder(seed, tuple(shares), tuple(shard_sizes), global_batch, block_shards)

    def _part(self, split: str) -> str:
        """How a message names what is taken of a split."""
        return f"split {split!r}" + (f" (data.fraction={self._fraction:g})" if self._fraction != 100 else "")

    def labels(self, name: str) -> NDArray[np.int64]:
        """The ids of a label, places in `label_names`: (N,), -1 where unknown, as in datasets that do not have it.

        Raises:
            UserError: no dataset has it; names the nearest.
        """
        place = {word: number for number, word in enumerate(self.label_names(name))}
        columns = []
        for dataset in self.datasets:
            if name in dataset.info.labels:
                # One entry more than there are names: id -1 finds the unknown there.
                table = np.array([*(place[word] for word in dataset.label_names(name)), UNKNOWN], dtype=np.int64)
                columns.append(table[dataset.labels(name)])
            else:
                _log.info("%s has no label %r: it is unknown for its %d images", dataset.path, name, len(dataset))
                columns.append(np.full(len(dataset), UNKNOWN, dtype=np.int64))
        return np.concatenate(columns)

    def label_names(self, name: str) -> list[str]:
        """What the ids of a label mean: the names of all datasets, equal ones joined, in order of first appearance.

        Raises:
            UserError: no dataset has the label; names the nearest.
        """
        having = [dataset for dataset in self.datasets if name in dataset.info.labels]
        if not having:
            there = dict.fromkeys(label for dataset in self.datasets for label in dataset.info.labels)
            raise UserError(f"there is no label {name!r} in {self}{nearest(name, there) or '; it has none'}")
        return list(dict.fromkeys(word for dataset in having for word in dataset.label_names(name)))

    def sample_name(self, row: int) -> tuple[int, str, str]:
        """The number of a row's dataset, its shard and its key there: how a message names a sample."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, *self.datasets[number].sample_name(row - int(self._starts[number]))

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The encoded images of some rows, as `Dataset.read` gives them."""
        which = np.searchsorted(self._starts, rows, side="right") - 1
        images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(rows)
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            found = self.datasets[number].read(rows[here] - self._starts[number])
            for place, image in zip(here.tolist(), found, strict=True):
                images[place] = image
        return images

    def normalisation(self, split: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the intensities in 0..1 that a run sees, as those of `channels` channels.

        With dataset d's share s, mean m and deviation v: M = sum s m, and V = sqrt(sum s (v^2 + (m - M)^2)).

        Raises:
            UserError: the preparation of a dataset did not measure them.
        """
        shares = np.array([float(share) for share in self.shares(split)])[:, None]
        measured = [_normalisation(dataset, channels) for dataset in self.datasets]
        means, stds = np.stack([mean for mean, _ in measured]), np.stack([std for _, std in measured])
        mean = (shares * means).sum(axis=0)
        std = np.sqrt((shares * (stds**2 + (means - mean) ** 2)).sum(axis=0))
        return tuple(np.round(mean, 6).tolist()), tuple(np.round(np.maximum(std, 1e-3), 6).tolist())


def _shard_sizes(dataset: Dataset, rows: NDArray[np.int64]) -> tuple[int, ...]:
    """How many of some rows each shard holds that has any."""
    sizes = np.bincount(dataset.shard_ids[rows])
    return tuple(sizes[sizes > 0].tolist())


def _normalisation(dataset: Dataset, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A dataset's mean and deviation, (channels,) each.

    From colour to gray the mean is exact and the deviation that of perfectly correlated channels.
    """
    measured = dataset.info.statistics
    if measured is None:
        raise UserError(
            f"{dataset.path} has no mean and std, for it has no train images that were decoded; give data.mean and "
            "data.std, a value in 0..1 for each channel"
        )
    mean, std = np.asarray(measured.mean), np.asarray(measured.std)
    if len(mean) == 3 and channels == 1:
        mean, std = mean @ _LUMA[:, None], std @ _LUMA[:, None]
    if len(mean) == 1 and channels == 3:
        mean, std = mean.repeat(3), std.repeat(3)
    return mean, std
