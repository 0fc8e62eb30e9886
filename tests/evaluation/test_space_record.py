from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from medpretrain.evaluation.results import SourceRecord
from medpretrain.evaluation.space_record import (
    Histogram,
    Picture,
    Points,
    Projection,
    SpaceData,
    SpaceMetrics,
    SpaceRecord,
    picture_path,
    read,
    write,
)

POINTS = Points(
    row_N=np.array([4, 7, 9]),
    patient_N=np.array([0, 0, 1 << 40]),
    label_N=np.array([0, 1, 1], np.int32),
    labels={"class": ["a", "b", "b"], "row": ["x", None, "y"]},  # a label may have any name
    projections={"tsne": np.array([[0.5, 1], [2, 3], [np.nan, np.nan]])},
)


def record(**changes) -> SpaceRecord:
    metrics = SpaceMetrics(
        sad=None, saa=None, cad=0.5, cac=0.75, gpu=-1, alignment=None, uniformity=-2, rankme=3, feature_std=0.9
    )
    data = SpaceData(
        name="d",
        sha256="ab",
        label="class",
        classes=["a", "b"],
        split="test",
        counts=[1, 2],
        n_images=3,
        n_labelled=3,
        left_out=0,
        patients="partly known",
    )
    return SpaceRecord(
        source=SourceRecord(name="s", kind="run", sha256="cd", architecture="resnet18", about={"step": 3}),
        data=data,
        view="{}",
        view_from="default",
        views=1,
        seed=0,
        metrics=metrics,
        neighbourhood=1,
        histogram=Histogram(edges=[0, 1], positive=[0], negative=[3], positive_mean=None, negative_mean=0.5),
        projections=[Projection(name="tsne", parameters={}, seed=0, n_points=2)],
        other_patients_only=False,
        neighbours=[],
        no_attention="none",
        pictures=[],
        seconds=1,
        device="cpu",
        medpretrain_version="0",
    ).model_copy(update=changes)


def with_picture() -> tuple[SpaceRecord, dict[str, np.ndarray]]:
    picture = Picture(file="row-4.png", kind="image", row=4, number=None)
    return record(pictures=[picture]), {"row-4.png": np.arange(64, dtype=np.uint8).reshape(8, 8)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    kept, pictures = with_picture()
    path = write(tmp_path / "new", kept, POINTS, pictures)
    found, points = read(path)
    assert found == kept
    assert path.name == f"{kept.file_stem()}.space.json"
    for name in ("row_N", "patient_N", "label_N"):
        np.testing.assert_array_equal(getattr(points, name), getattr(POINTS, name))
    assert points.labels == POINTS.labels
    np.testing.assert_array_equal(points.projections["tsne"], POINTS.projections["tsne"])
    pixels = np.asarray(Image.open(picture_path(path, found.of_kind("image", 4)[0])))
    np.testing.assert_array_equal(pixels, pictures["row-4.png"])


def test_pictures_left_out_are_gone(tmp_path: Path) -> None:
    kept, pictures = with_picture()
    path = write(tmp_path, kept, POINTS, pictures)
    assert write(tmp_path, record(), POINTS) == path
    assert not list(tmp_path.rglob("*.png"))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".parquet"]


def test_a_stem_is_of_source_data_and_view() -> None:
    stem = record().file_stem()
    assert record(seconds=9.0, device="gpu").file_stem() == stem
    other = record().source.model_copy(update={"sha256": "other"})
    assert len({stem, record(source=other).file_stem(), record(views=2).file_stem(), record(view="x").file_stem()}) == 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')), "version 2"),
        (lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "p1"})), "was changed: key"),
        (lambda path: next(path.parent.glob("*.parquet")).unlink(), "parquet is missing"),
        (lambda path: next(path.parent.rglob("*.png")).unlink(), "row-4.png is missing"),
        (
            lambda path: path.write_text(path.read_text().replace('"n_images": 3', '"n_images": 2')),
            "does not have the 2 images",
        ),
    ],
)
def test_what_is_not_whole_or_newer_is_refused_in_one_line(tmp_path: Path, spoil, message: str) -> None:
    kept, pictures = with_picture()
    path = write(tmp_path, kept, POINTS, pictures)
    spoil(path)
    with pytest.raises(UserError, match=message) as refused:
        read(path)
    assert "\n" not in str(refused.value)
