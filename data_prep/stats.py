"""What a dataset holds, counted from its index."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.dataset import Dataset


def stats(dataset: Dataset) -> dict[str, Any]:
    """Counts, labels, patients, sizes and bytes, as plain values that JSON can hold.

    `labels` gives for each label and value the number of images a split; `(unknown)` stands for no value.
    """
    splits = list(dataset.info.splits)
    rows = {split: dataset.rows(split) for split in splits}
    labels: dict[str, dict[str, dict[str, int]]] = {}
    for name in dataset.info.labels:
        ids = dataset.labels(name)
        names = [*dataset.label_names(name), "(unknown)"]
        # An id of -1 counts in the last place.
        counts = {split: np.bincount(ids[rows[split]] % len(names), minlength=len(names)).tolist() for split in splits}
        labels[name] = {
            value: {split: counts[split][place] for split in splits}
            for place, value in enumerate(names)
            if any(counts[split][place] for split in splits)
        }
    patients = dataset.index.column("patient")
    shorter = dataset.sizes.min(axis=1)
    statistics = dataset.info.statistics
    return {
        "path": str(dataset.path),
        "sha256": dataset.sha256,
        "created_by": dataset.info.created_by,
        "images": len(dataset),
        "quarantined": dataset.info.quarantined,
        "splits": dict(dataset.info.splits),
        "patients": {
            "known": dataset.info.patients.known,
            "images_without": dataset.info.patients.images_without,
            "most_images": dataset.info.patients.most_images,
            "by_split": {split: len(patients.take(rows[split]).drop_null().unique()) for split in splits},
        },
        "labels": labels,
        "height": _spread(dataset.sizes[:, 0]),
        "width": _spread(dataset.sizes[:, 1]),
        "shorter_side": _spread(shorter),
        "bit_depth": dataset.bit_depth,
        "channels": dataset.channels,
        "mean": None if statistics is None else statistics.mean,
        "std": None if statistics is None else statistics.std,
        "shards": len(dataset.info.shards),
        "bytes": sum(shard.bytes for shard in dataset.info.shards),
    }


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
