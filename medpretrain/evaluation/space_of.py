"""A look at the representation space of one source on one split of a dataset, measured, drawn and written down."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.data.views import View
from medpretrain.evaluation.attention import why_no_attention
from medpretrain.evaluation.augmented import augmented, default_view, view_features
from medpretrain.evaluation.features import extract
from medpretrain.evaluation.labelled import Labelled, knowledge, labelled, occurring_classes
from medpretrain.evaluation.metrics import require_all_classes
from medpretrain.evaluation.neighbours import nearest_images, some_of_each, stratified
from medpretrain.evaluation.projection import TECHNIQUES, project
from medpretrain.evaluation.results import SourceRecord
from medpretrain.evaluation.space import distance_histogram, neighbourhood, space_metrics
from medpretrain.evaluation.space_pictures import Pictures, attention_of, images_of, views_of
from medpretrain.evaluation.space_record import (
    Neighbour,
    Neighbours,
    Points,
    Projection,
    SpaceData,
    SpaceRecord,
    write,
)
from medpretrain.models.preprocessing import Preprocessing

MOST_IMAGES = 20_000
"""Distances are between all pairs of views: twice the images cost four times as much."""
MOST_POINTS = 5_000
QUERIES, NEIGHBOURS, ATTENTION_IMAGES = 2, 6, 6
"""Images of each class whose neighbours are shown; neighbours of each; how many of these images have attention maps."""


class Measured(Protocol):
    """What is asked of a source."""

    @property
    def backbone(self) -> nn.Module: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    def record(self) -> SourceRecord: ...


def measure_space(
    source: Measured,
    dataset: Dataset,
    *,
    label: str,
    split: str,
    out_folder: Path,
    images: bool,
    views: int = 2,
    view: View | None = None,
    view_from: Literal["source", "given"] = "given",
    projections: Sequence[str] = TECHNIQUES,
    max_points: int = MOST_POINTS,
    max_images: int = MOST_IMAGES,
    other_patients_only: bool = False,
    leave_out: bool = False,
    plain_ND: NDArray[np.float32] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 2,
) -> SpaceRecord:
    """Measure, draw and write: the record, a point an image, pictures.

    The measures and the histogram are of augmented views; maps and neighbours are of whole images.

    Args:
        source: what is looked at; its backbone is moved to the device.
        dataset: where the images are.
        label: whose classes are told apart.
        split: the images.
        out_folder: where the files go, made if need be; their names begin with `SpaceRecord.file_stem()`.
        images: write pictures of images, views and attention: they are pictures of patients.
        views: of each image; one has no SAD, SAA and alignment.
        view: how they are augmented, at the source's own size whatever its own; None: `default_view`.
        view_from: whether `view` is the source's own, of `augmented.view_of(recipe)`; said in the record.
        projections: out of `tsne` and `umap`.
        max_points: images drawn; of more a stratified part is, and the record says so.
        max_images: images measured; of more a stratified part is, and the record says so.
        other_patients_only: show neighbours of other patients only; an image whose patient is unknown is another's.
        leave_out: leave out, and count, images without the label, instead of refusing them.
        plain_ND: features of all labelled images of the split, whole, in the order of their rows, where they are
            there already; None: they are taken.
        seed: of views, stratified parts, queries and maps.
        device: of the network and the distances.
        threads: of the CPU, to decode.

    Raises:
        UserError: no such split, label or projection; images without the label; a class of the dataset without an image
            in the split; fewer than two images; features that are not finite.
        WorkFailed: an image does not decode.
    """
    started = time.perf_counter()
    device, preprocessing = torch.device(device), source.preprocessing
    whole = labelled(dataset, [split], label, occurring_classes(dataset, label), leave_out=leave_out)
    require_all_classes(whole.labels_N, whole.classes, where=f"split {split!r} of {dataset.path}")
    chosen = stratified(whole.labels_N, max_images, seed)
    rows, labels_N, patients_N = whole.rows_N[chosen], whole.labels_N[chosen], whole.patients_N[chosen]
    used = (view or default_view(preprocessing.size)).model_copy(update={"size": preprocessing.size, "count": 1})
    if plain_ND is None:
        plain_ND = extract(source.backbone, dataset, rows, preprocessing, device=device)
    elif len(plain_ND) != len(whole):
        raise UserError(f"{len(plain_ND)} features are given of {len(whole)} images")
    else:
        plain_ND = plain_ND[chosen]
    made = augmented(dataset, rows, used, preprocessing, views=views, seed=seed, device=device, threads=threads)
    features_NVD = torch.from_numpy(view_features(source.backbone, made, device)).to(device)
    metrics, histogram = space_metrics(features_NVD, labels_N), distance_histogram(features_NVD)

    shown = stratified(labels_N, max_points, seed)
    drawn = [_draw(name, plain_ND, shown, seed) for name in projections]
    queries = some_of_each(labels_N, QUERIES, seed)
    neighbours = _neighbours(plain_ND, rows, labels_N, queries, patients_N if other_patients_only else None, device)
    pictures: Pictures = []
    no_attention = why_no_attention(source.backbone)
    if images:
        asked = rows[queries].tolist()
        near = [one.row for each in neighbours for one in each.nearest]
        pictures = images_of(dataset, [*asked, *near], preprocessing, device)
        pictures += views_of(dataset, asked, used, preprocessing, views=views, seed=seed, device=device)
        # One of each class before a second of any.
        turns = [one for turn in range(QUERIES) for one in _turn(rows[queries], labels_N[queries], turn)]
        pictures += attention_of(dataset, turns[:ATTENTION_IMAGES], source.backbone, preprocessing, device)
    else:
        no_attention = no_attention or "pictures were left out"
    record = SpaceRecord(
        source=source.record(),
        data=_data(whole, label, split, labels_N),
        view=used.model_dump_json(),
        view_from=view_from if view else "default",
        views=views,
        seed=seed,
        metrics=metrics,
        neighbourhood=neighbourhood(len(rows) * views),
        histogram=histogram,
        projections=[projection for projection, _ in drawn],
        other_patients_only=other_patients_only,
        neighbours=neighbours,
        no_attention=no_attention,
        pictures=[picture for picture, _ in pictures],
        seconds=time.perf_counter() - started,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        medpretrain_version=importlib.metadata.version("medpretrain"),
    )
    names = {name: _names(dataset, name, rows) for name in dataset.info.labels}
    points = Points(rows, patients_N, labels_N, names, {projection.name: place for projection, place in drawn})
    write(out_folder, record, points, {picture.file: pixels for picture, pixels in pictures})
    return record


def _data(whole: Labelled, label: str, split: str, labels_N: NDArray[np.int32]) -> SpaceData:
    return SpaceData(
        name=whole.dataset.path.resolve().name,
        sha256=whole.dataset.sha256,
        label=label,
        classes=list(whole.classes),
        split=split,
        counts=np.bincount(labels_N, minlength=len(whole.classes)).tolist(),
        n_images=len(labels_N),
        n_labelled=len(whole),
        left_out=whole.left_out,
        patients=knowledge(whole.dataset),  # type: ignore[arg-type] # one of the three words
    )


def _draw(
    name: str, plain_ND: NDArray[np.float32], shown: NDArray[np.int64], seed: int
) -> tuple[Projection, NDArray[np.float64]]:
    places, parameters = project(name, plain_ND[shown], seed)
    place_N2 = np.full((len(plain_ND), 2), np.nan)
    place_N2[shown] = places
    technique = next(one for one in TECHNIQUES if one == name)
    return Projection(name=technique, parameters=parameters, seed=seed, n_points=len(shown)), place_N2


def _neighbours(
    plain_ND: NDArray[np.float32],
    rows: NDArray[np.int64],
    labels_N: NDArray[np.int32],
    queries: NDArray[np.int64],
    patients_N: NDArray[np.int64] | None,
    device: torch.device,
) -> list[Neighbours]:
    found = nearest_images(torch.from_numpy(plain_ND).to(device), queries.tolist(), NEIGHBOURS, patients_N=patients_N)
    return [
        Neighbours(
            row=int(rows[query]),
            label=int(labels_N[query]),
            nearest=[
                Neighbour(row=int(rows[place]), label=int(labels_N[place]), similarity=similarity)
                for place, similarity in near
            ],
        )
        for query, near in zip(queries.tolist(), found, strict=True)
    ]


def _turn(rows: NDArray[np.int64], labels: NDArray[np.int32], turn: int) -> list[int]:
    """The `turn`-th row of each class that has so many."""
    return [int(rows[labels == one][turn]) for one in np.unique(labels) if (labels == one).sum() > turn]


def _names(dataset: Dataset, label: str, rows: NDArray[np.int64]) -> list[str | None]:
    names = [*dataset.label_names(label), None]  # -1, unknown, takes the last
    return [names[number] for number in dataset.labels(label)[rows].tolist()]
