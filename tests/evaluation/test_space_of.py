"""A look at a real, tiny dataset through tiny networks, and what of it is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.data.batches import Stream, plain_batches
from medpretrain.data.mixture import Mixture
from medpretrain.data.views import Blur, Jitter, View
from medpretrain.evaluation import augmented as room
from medpretrain.evaluation.augmented import augmented, default_view, view_features
from medpretrain.evaluation.features import extract
from medpretrain.evaluation.results import SourceRecord
from medpretrain.evaluation.space import distance_histogram, space_metrics
from medpretrain.evaluation.space_of import measure_space
from medpretrain.evaluation.space_record import SUFFIX, SpaceRecord, picture_path, read
from medpretrain.models.backbones import create_backbone
from medpretrain.models.preprocessing import Preprocessing

CPU = torch.device("cpu")
GRAY = Preprocessing(size=32, channels=1, mean=(0.4,), std=(0.2,))


def source(name: str = "resnet10t") -> SimpleNamespace:
    torch.manual_seed(0)
    backbone = create_backbone(name, channels=1, image_size=32).eval()
    said = SourceRecord(name=name, kind="random", sha256="cd" * 32, architecture=name, about={})
    return SimpleNamespace(backbone=backbone, preprocessing=GRAY, record=lambda: said)


def look(dataset: Path, out: Path, **options) -> SpaceRecord:
    settings = {"label": "class", "split": "test", "out_folder": out, "images": False, "projections": ("tsne",)}
    network = options.pop("source", None) or source()
    return measure_space(network, Dataset.open(dataset), **(settings | options))


@pytest.fixture(scope="module")
def seen(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SpaceRecord]:
    """One look with pictures, through a Vision Transformer."""
    out = tmp_path_factory.mktemp("seen")
    network = source("vit_tiny_patch16_224")
    return out, look(small_dataset, out, source=network, images=True, other_patients_only=True, views=3)


def test_views_depend_on_seed_row_and_number_alone(small_dataset: Path) -> None:
    dataset, view = Dataset.open(small_dataset), default_view(32)
    rows = np.array([9, 3, 40, 3], np.int64)

    def made(rows: np.ndarray, seed: int = 5, batch: int = 3) -> torch.Tensor:
        return torch.cat(list(augmented(dataset, rows, view, GRAY, views=2, seed=seed, device=CPU, batch=batch)))

    views = made(rows)
    assert views.shape == (4, 2, 1, 32, 32)
    assert torch.equal(views[1], views[3])
    assert torch.equal(made(rows[2:3], batch=8)[0], views[2])
    assert not torch.equal(views[:, 0], views[:, 1])
    assert not torch.equal(made(rows, seed=6), views)


def test_views_are_those_of_the_stream(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream's first batch, sample by sample: the same draws give the same pixels."""
    view = View(
        size=32, count=2, crop=(0.3, 1.0), flip=0.5, jitter=Jitter(brightness=0.4, contrast=0.4), blur=Blur(kernel=5)
    )
    dataset = Dataset.open(small_dataset)
    kind = {"crop": view}
    stream = Stream(
        Mixture([dataset]),
        kind,
        split="train",
        seed=7,
        global_batch=8,
        channels=1,
        mean=GRAY.mean,
        std=GRAY.std,
        device=CPU,
        threads=1,
    )
    batches = stream.batches(0)
    batch = next(batches)
    batches.close()
    monkeypatch.setattr(room, "_NAME", "crop")
    # A row is its own sample number here, as in a stream over all rows of the split, whose rows are not 0, 1, 2.
    rows = dataset.rows("train")[batch.samples.numpy()]
    number = dict(zip(rows.tolist(), batch.samples.tolist(), strict=True))
    drawn = room.draw
    monkeypatch.setattr(
        room, "draw", lambda view, **told: drawn(view, **told | {"sample": np.vectorize(number.get)(told["sample"])})
    )
    found = next(iter(augmented(dataset, rows, view, GRAY, views=2, seed=7, device=CPU, batch=8)))
    for turn in range(2):
        torch.testing.assert_close(found[:, turn], batch.micro[0]["crop"][turn], rtol=0, atol=1e-6)


def test_what_is_recorded_is_what_the_views_measure(small_dataset: Path, tmp_path: Path) -> None:
    dataset, network = Dataset.open(small_dataset), source()
    record = look(small_dataset, tmp_path, source=network, seed=2)
    rows = dataset.rows("test")
    made = augmented(dataset, rows, default_view(32), GRAY, views=2, seed=2, device=CPU, batch=64)
    features = torch.from_numpy(view_features(network.backbone, made, CPU))
    assert record.metrics == space_metrics(features, dataset.labels("class")[rows])
    assert record.histogram == distance_histogram(features)
    assert record.view_from == "default"
    assert View.model_validate_json(record.view) == default_view(32)
    assert record.data.counts == np.bincount(dataset.labels("class")[rows]).tolist()
    assert record.no_attention == "a ResNet has no attention"


def test_points_are_rows_with_their_labels(small_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(small_dataset)
    record = look(small_dataset, tmp_path, max_points=9)
    found, points = read(tmp_path / f"{record.file_stem()}{SUFFIX}")
    assert found == record
    np.testing.assert_array_equal(points.row_N, dataset.rows("test"))
    names = np.array(dataset.label_names("anatomy"))[dataset.labels("anatomy")[points.row_N]]
    assert points.labels["anatomy"] == names.tolist()
    assert record.projections[0].n_points == 9 == np.isfinite(points.projections["tsne"]).all(axis=1).sum()


def test_a_stratified_part_is_measured_and_said_so(small_dataset: Path, tmp_path: Path) -> None:
    record = look(small_dataset, tmp_path, max_images=9)
    assert (record.data.n_images, sum(record.data.counts)) == (9, 9)
    assert record.data.n_labelled == len(Dataset.open(small_dataset).rows("test"))


def test_features_that_are_there_already_are_used(small_dataset: Path, tmp_path: Path) -> None:
    dataset, network = Dataset.open(small_dataset), source()
    rows = dataset.rows("test")
    there = extract(network.backbone, dataset, rows, GRAY, device="cpu")
    first = look(small_dataset, tmp_path, source=network)
    assert look(small_dataset, tmp_path, source=network, plain_ND=there).neighbours == first.neighbours
    flipped = look(small_dataset, tmp_path, source=network, plain_ND=there[::-1].copy())
    assert flipped.neighbours != first.neighbours
    with pytest.raises(UserError, match="1 features are given of"):
        look(small_dataset, tmp_path, source=network, plain_ND=there[:1])


def test_neighbours_are_other_images(seen: tuple[Path, SpaceRecord], small_dataset: Path) -> None:
    _, record = seen
    test = set(Dataset.open(small_dataset).rows("test").tolist())
    assert {one.label for one in record.neighbours} == {0, 1, 2}
    for one in record.neighbours:
        near = [other.row for other in one.nearest]
        assert len(near) == 6
        assert one.row not in near
        assert set(near) <= test


def test_pictures_are_of_the_pixels_the_network_saw(seen: tuple[Path, SpaceRecord], small_dataset: Path) -> None:
    out, record = seen
    path = out / f"{record.file_stem()}{SUFFIX}"
    assert {file.name for file in out.rglob("*.png")} == {picture.file for picture in record.pictures}
    row = record.neighbours[0].row
    dataset, rows = Dataset.open(small_dataset), np.array([record.neighbours[0].row])
    [plain] = plain_batches(dataset, rows, size=32, channels=1, mean=(0.0,), std=(1.0,), batch=1, device=CPU)
    [image] = record.of_kind("image", row)
    np.testing.assert_array_equal(np.asarray(Image.open(picture_path(path, image))), (plain[0, 0] * 255).round())
    views = record.of_kind("view", row)
    assert [picture.number for picture in views] == [0, 1, 2]
    made = next(iter(augmented(dataset, rows, default_view(32), GRAY, views=3, seed=0, device=CPU, batch=1)))
    shown = ((made[0, 1, 0] * 0.2 + 0.4).clamp(0, 1) * 255).round()
    np.testing.assert_allclose(np.asarray(Image.open(picture_path(path, views[1]))), shown, atol=1)
    assert [picture.number for picture in record.of_kind("attention", row)] == [None, 0, 1, 2]
    assert record.no_attention is None


def test_without_images_there_is_no_pixel_on_disk(small_dataset: Path, tmp_path: Path) -> None:
    record = look(small_dataset, tmp_path, source=source("vit_tiny_patch16_224"))
    assert record.no_attention == "pictures were left out"
    assert not record.pictures
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".parquet"]


def test_no_name_of_a_patient_or_a_sample_is_written(seen: tuple[Path, SpaceRecord], small_dataset: Path) -> None:
    out, record = seen
    index = Dataset.open(small_dataset).index
    text = (out / f"{record.file_stem()}{SUFFIX}").read_text()
    _, points = read(out / f"{record.file_stem()}{SUFFIX}")
    for column in ("key", "patient", "shard"):
        for word in {str(value) for value in index.column(column).to_pylist() if value is not None}:
            assert json.dumps(word) not in text
            assert word not in str(dict(points.labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "no images in a split 'val'"),
        ({"label": "colour"}, "no label 'colour'"),
        ({"projections": ("pca",)}, "no projection 'pca'"),
        ({"views": 0}, "no views to make"),
        ({"max_images": 2}, "cannot stand for 3 classes"),
    ],
)
def test_what_cannot_be_measured_is_refused(small_dataset: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        look(small_dataset, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_are_refused_and_nothing_written(small_dataset: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) / 0

    broken = source()
    broken.backbone = Broken()
    with pytest.raises(UserError, match="not finite"):
        look(small_dataset, tmp_path, source=broken)
    assert not list(tmp_path.iterdir())
