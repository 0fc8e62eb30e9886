"""Evaluate a frozen backbone on a labelled dataset: from its images to three numbers and what they stand on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from data_prep.errors import UserError, nearest
from medpretrain.evaluation.features import Batches, extract
from medpretrain.evaluation.knn import knn_scores
from medpretrain.evaluation.linear import linear_scores
from medpretrain.evaluation.metrics import metrics, require_all_classes
from medpretrain.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from data_prep.dataset import Dataset

Protocol = Literal["knn", "linear"]
VAL_SPLIT = "val"


class Result(BaseModel):
    """One evaluation; whoever reads it needs nothing else to repeat it with the same backbone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol
    dataset_sha256: str
    label: str
    classes: list[str]
    """In the order of the label's vocabulary; of two, AUROC is that of the second."""
    train_split: str
    test_split: str
    n_train: int
    n_val: int
    """Labelled images C was chosen on; 0 if none were used."""
    n_test: int
    excluded: dict[str, int]
    """Images without this label, by split; they are in none of the numbers above."""
    parameters: dict[str, bool | int | float | str]
    """kNN: k (as used) and temperature. Linear: C, chosen_on, iterations, converged."""
    accuracy: float
    auroc: float
    aupr: float
    seconds: float
    """Wall time, reading of images included."""


def evaluate(
    protocol: Protocol,
    backbone: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    label: str = "class",
    device: torch.device | str,
    train_split: str = "train",
    test_split: str = "test",
    k: int = 200,
    temperature: float = 0.07,
    batch: int = 256,
    batches: Batches | None = None,
) -> Result:
    """Accuracy, AUROC and AUPR on the test split of a classifier on frozen features of the train split.

    The classes are the names of the label's vocabulary that occur in the dataset, in whatever split.
    Images whose label is unknown (-1) are left out and counted. The linear probe chooses C on the split "val" if the
    dataset has one with labels; the result says whether it did.

    Args:
        protocol: "knn" (weighted, cosine) or "linear" (logistic regression).
        backbone: maps images (n, C, S, S) to features (n, D); put into eval mode.
        dataset: with the two splits and the label.
        preprocessing: what the backbone was trained with.
        label: the name of a label of the dataset.
        device: where the backbone runs.
        train_split: what the classifier learns from.
        test_split: what it is measured on.
        k: neighbours of kNN, clipped to the training images.
        temperature: of kNN's weights.
        batch: images at once through the backbone.
        batches: reads the images; medpretrain's own pipeline if left out.

    Raises:
        UserError: an unknown protocol, split or label; a class without an image in one of the two splits; features
            that are not finite.
    """
    started = time.perf_counter()
    if protocol not in get_args(Protocol):
        raise UserError(f"there is no protocol {protocol!r}{nearest(str(protocol), get_args(Protocol))}")
    if train_split == test_split:
        raise UserError(f"the test split must not be the train split {train_split!r}")
    classes, all_labels = _occurring(dataset.label_names(label), dataset.labels(label))
    splits = {"train": train_split, "test": test_split}
    if protocol == "linear" and dataset.info.splits.get(VAL_SPLIT) and VAL_SPLIT not in splits.values():
        splits["val"] = VAL_SPLIT

    rows: dict[str, NDArray[np.int64]] = {}
    labels: dict[str, NDArray[np.int32]] = {}
    excluded: dict[str, int] = {}
    for part, split in splits.items():
        of_split = dataset.rows(split)
        known = all_labels[of_split] >= 0
        rows[part], labels[part] = of_split[known], all_labels[of_split[known]]
        excluded[split] = int((~known).sum())
    # Before the images are read: an answer in a second, not after an hour.
    for part in ("train", "test"):
        require_all_classes(labels[part], classes, where=f"label {label!r} of split {splits[part]!r}")

    if "val" in splits and not len(rows["val"]):
        del splits["val"]
    features = {
        part: extract(backbone, dataset, rows[part], preprocessing, device=device, batch=batch, batches=batches)
        for part in splits
    }
    parameters: dict[str, bool | int | float | str]
    if protocol == "knn":
        train, train_labels, test = (
            torch.from_numpy(array).to(device) for array in (features["train"], labels["train"], features["test"])
        )
        scores = knn_scores(train, train_labels, test, len(classes), k=k, temperature=temperature).cpu().numpy()
        parameters = {"k": min(k, len(rows["train"])), "temperature": temperature}
    else:
        val = (features["val"], labels["val"]) if "val" in splits else None
        probe = linear_scores(features["train"], labels["train"], features["test"], len(classes), val=val)
        scores = probe.scores
        parameters = {
            "C": probe.C,
            "chosen_on": probe.chosen_on,
            "iterations": probe.iterations,
            "converged": probe.converged,
        }
    measured = metrics(scores, labels["test"], classes)
    return Result(
        protocol=protocol,
        dataset_sha256=dataset.sha256,
        label=label,
        classes=list(classes),
        train_split=train_split,
        test_split=test_split,
        n_train=len(rows["train"]),
        n_val=len(rows.get("val", ())),
        n_test=len(rows["test"]),
        excluded=excluded,
        parameters=parameters,
        **measured.model_dump(),
        seconds=time.perf_counter() - started,
    )


def _occurring(names: list[str], labels_N: NDArray[np.int32]) -> tuple[list[str], NDArray[np.int32]]:
    """The names some image has, and the labels in their numbers: a vocabulary knows more than a dataset holds."""
    present = np.unique(labels_N[labels_N >= 0])
    renumbered = np.full(len(names) + 1, -1, dtype=np.int32)  # the last place is that of -1
    renumbered[present] = np.arange(len(present))
    return [names[k] for k in present], renumbered[labels_N]
