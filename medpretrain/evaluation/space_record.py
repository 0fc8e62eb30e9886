"""What a look at a representation space leaves behind: numbers as JSON, a point an image as Parquet, a few pictures."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError
from medpretrain.evaluation.results import SourceRecord, Value, read_record
from medpretrain.whole import whole_file

FORMAT = "medpretrain space"
VERSION = 1
SUFFIX = ".space.json"
POINTS = ".points.parquet"
IMAGES = ".images"
LABEL_PREFIX = "label."

Technique = Literal["tsne", "umap"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpaceData(_Record):
    """The images a space was measured on."""

    name: str
    """The dataset's folder name."""
    sha256: str
    label: str
    classes: list[str]
    """In the order of the vocabulary."""
    split: str
    counts: list[int]
    """Images of each class that were measured."""
    n_images: int
    n_labelled: int
    """Images of the split with this label; more than `n_images` where a stratified part of them was measured."""
    left_out: int
    """Images of the split without this label."""
    patients: Literal["known", "partly known", "unknown"]


class SpaceMetrics(_Record):
    """Measures of unit-length features of views; None where one is not defined. See `space.py` for the equations."""

    sad: float | None
    """Sample alignment distance, 0 to 2, low where views of an image lie together; None for one view."""
    saa: float | None
    """Sample alignment accuracy, 0 to 1; None for one view."""
    cad: float
    """Class alignment distance, 0 to 2."""
    cac: float | None
    """Class alignment consistency, 0 to 1; None for one class."""
    gpu: float
    """Gaussian potential uniformity, -4 to 0, low where features are spread out."""
    alignment: float | None
    """Of Wang and Isola, alpha 2: 0 to 4; None for one view."""
    uniformity: float
    """Of Wang and Isola, t 2: -8 to 0."""
    rankme: float
    """Dimensions that the features of the first views fill."""
    feature_std: float
    """About 1 when spread out, 0 when all images have the same feature."""


class Histogram(_Record):
    """Euclidean distances between features as the backbone gives them, not normalised."""

    edges: list[float]
    """B + 1, ascending from 0; a bin holds its lower edge, the last both."""
    positive: list[int]
    """B counts of pairs of views of the same image."""
    negative: list[int]
    """B counts of pairs of views of different images."""
    positive_mean: float | None
    """None for one view."""
    negative_mean: float


class Projection(_Record):
    """A map of the images onto two dimensions; the points are in the Parquet file as `NAME_0` and `NAME_1`."""

    name: Technique
    parameters: dict[str, Value]
    """As used, with the version of the library and what was done to the features first."""
    seed: int
    n_points: int
    """Fewer than the images measured where a stratified part of them is shown; the others have null."""


class Neighbour(_Record):
    row: int
    label: int
    """A place in `classes`."""
    similarity: float
    """Cosine, -1 to 1."""


class Neighbours(_Record):
    """An image, and the images that lie nearest to it, nearest first."""

    row: int
    label: int
    nearest: list[Neighbour]


class Picture(_Record):
    """A PNG file in the folder STEM.images, of the pixels as the backbone saw them."""

    file: str
    kind: Literal["image", "view", "attention"]
    row: int
    number: int | None
    """Of a view or an attention head, from 0; None for an image, and for the mean over heads."""


class SpaceRecord(_Record):
    """One source, one split of one dataset. Images are named by their rows in the dataset's index, by nothing else."""

    format: Literal["medpretrain space"] = "medpretrain space"
    version: Literal[1] = 1
    source: SourceRecord
    data: SpaceData
    view: str
    """How views are augmented: a `View` as JSON."""
    view_from: Literal["source", "default", "given"]
    """`source`: as the source was trained; distances between views compare only where the view is the same."""
    views: int
    """Of each image."""
    seed: int
    metrics: SpaceMetrics
    neighbourhood: int
    """Views in a neighbourhood of CAC."""
    histogram: Histogram
    projections: list[Projection]
    other_patients_only: bool
    """Whether neighbours of the same patient were passed over."""
    neighbours: list[Neighbours]
    no_attention: str | None
    """Why there are no attention maps; None where there are."""
    pictures: list[Picture]
    seconds: float
    device: str
    medpretrain_version: str

    def comparable(self) -> str:
        """What two spaces must share to be compared: the data and the view; a SHA-256."""
        return _digest(self.model_dump(include={"data", "view", "views", "seed"}))

    def file_stem(self) -> str:
        """The same look at the same source replaces its files; any other has another name."""
        return f"space-{self.data.label}-{_digest([self.comparable(), self.source.sha256])[:8]}"

    def of_kind(self, kind: Literal["image", "view", "attention"], row: int) -> list[Picture]:
        """The pictures of one image."""
        return [picture for picture in self.pictures if picture.kind == kind and picture.row == row]


@dataclass(frozen=True)
class Points:
    """A row an image that was measured.

    Attributes:
        row_N: (N,) int64, the image's row in the dataset's index.
        patient_N: (N,) int64, a number a patient.
        label_N: (N,) int32, a place in the record's classes.
        labels: for every label of the dataset its (N,) names, None where unknown.
        projections: for each technique the points (N, 2), float64, NaN for an image that is not shown.
    """

    row_N: NDArray[np.int64]
    patient_N: NDArray[np.int64]
    label_N: NDArray[np.int32]
    labels: Mapping[str, list[str | None]]
    projections: Mapping[str, NDArray[np.float64]]


def write(
    folder: Path, record: SpaceRecord, points: Points, pictures: Mapping[str, NDArray[np.uint8]] | None = None
) -> Path:
    """Write all files into the folder, which is made; the JSON file comes last, so what it names is there.

    Pictures of an earlier look of the same name are removed: left out means gone.

    Args:
        pictures: for each file of `record.pictures` its pixels, (H, W) or (H, W, 3).

    Returns:
        The JSON file.
    """
    pictures = pictures or {}
    assert set(pictures) == {picture.file for picture in record.pictures}
    assert len(points.row_N) == record.data.n_images
    folder.mkdir(parents=True, exist_ok=True)
    stem = record.file_stem()
    images = folder / f"{stem}{IMAGES}"
    if images.exists():
        shutil.rmtree(images)
    if pictures:
        images.mkdir()
    for name, pixels in pictures.items():
        with whole_file(images / name) as partial:
            Image.fromarray(pixels).save(partial, format="PNG", optimize=True)
    columns: dict[str, pa.Array] = {
        "row": pa.array(points.row_N),
        "patient": pa.array(points.patient_N),
        "label": pa.array(points.label_N),
        **{LABEL_PREFIX + name: pa.array(names, pa.string()) for name, names in points.labels.items()},
    }
    for name, place_N2 in points.projections.items():
        for axis in (0, 1):
            columns[f"{name}_{axis}"] = pa.array(place_N2[:, axis], from_pandas=True)  # NaN becomes null
    with whole_file(folder / f"{stem}{POINTS}") as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")
    path = folder / f"{stem}{SUFFIX}"
    with whole_file(path) as partial:
        partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> tuple[SpaceRecord, Points]:
    """A record and its points.

    Raises:
        UserError: no such file, one that a newer medpretrain wrote, one that was changed, or a file of it missing.
    """
    record = read_record(path, SpaceRecord, FORMAT, VERSION)
    stem = path.name.removesuffix(SUFFIX)
    file = path.with_name(stem + POINTS)
    if not file.is_file():
        raise UserError(f"{file} is missing: {path.name} is not whole without it")
    table = pq.read_table(file)
    if len(table) != record.data.n_images:
        raise UserError(f"{file} does not have the {record.data.n_images} images that {path.name} counts")
    for picture in record.pictures:
        if not (path.with_name(stem + IMAGES) / picture.file).is_file():
            raise UserError(f"{picture.file} is missing in {stem}{IMAGES}: {path.name} is not whole without it")
    labels = {
        name.removeprefix(LABEL_PREFIX): table.column(name).to_pylist()
        for name in table.column_names
        if name.startswith(LABEL_PREFIX)
    }
    projections: dict[str, NDArray[np.float64]] = {
        one.name: np.stack([table.column(f"{one.name}_{axis}").to_numpy() for axis in (0, 1)], axis=1)
        for one in record.projections
    }
    row, patient, label = (table.column(name).to_numpy() for name in ("row", "patient", "label"))
    return record, Points(row, patient, label, labels, projections)


def picture_path(path: Path, picture: Picture) -> Path:
    """Where a picture of the record at `path` lies."""
    return path.with_name(path.name.removesuffix(SUFFIX) + IMAGES) / picture.file


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
