from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.evaluation.evaluate import Result, evaluate
from medpretrain.evaluation.features import extract
from medpretrain.evaluation.report import table, write_json
from medpretrain.models.preprocessing import Preprocessing

GRAY = Preprocessing(size=8, channels=1, mean=(0.5,), std=(0.5,))
SPLITS = {"train": range(60), "val": range(60, 90), "test": range(90, 130)}


class FakeDataset:
    """What an evaluation asks of a dataset, held in memory: three classes of brighter and brighter images."""

    sha256 = "ab" * 32
    vocabulary = ("dark", "grey", "bright")

    def __init__(self, splits: tuple[str, ...] = ("train", "val", "test")) -> None:
        rng = np.random.default_rng(11)
        self.info = SimpleNamespace(splits={split: len(SPLITS[split]) for split in splits})
        self.of_class = np.arange(130, dtype=np.int32) % 3
        self.images = (self.of_class[:, None, None, None] + 0.3 * rng.normal(size=(130, 1, 8, 8))).astype(np.float32)

    def rows(self, split: str) -> np.ndarray:
        if split not in self.info.splits:
            raise UserError(f"the dataset has no split {split!r}")
        return np.array(SPLITS[split], dtype=np.int64)

    def labels(self, name: str) -> np.ndarray:
        return self.of_class

    def label_names(self, name: str) -> list[str]:
        return list(self.vocabulary)


def batches(dataset: Any, rows: np.ndarray, *, batch: int, **settings: Any) -> Iterator[Tensor]:
    assert settings.pop("device") == torch.device("cpu")
    assert settings == {"size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    for start in range(0, len(rows), batch):
        yield torch.from_numpy(dataset.images[rows[start : start + batch]])


class Moments(nn.Module):
    """Features that tell the classes apart; BatchNorm shows whether eval mode was set."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.stack([x.mean(dim=(1, 2, 3)) - 1, x.std(dim=(1, 2, 3))], dim=1)


def run(dataset: FakeDataset, **options: Any) -> Result:
    settings: dict[str, Any] = {"protocol": "knn", "device": "cpu", "batches": batches, "batch": 7, **options}
    return evaluate(settings.pop("protocol"), Moments(), dataset, GRAY, **settings)  # type: ignore[arg-type]


def test_features_keep_the_order_of_the_rows_and_touch_no_statistics() -> None:
    dataset, backbone = FakeDataset(), Moments()
    rows = np.array([5, 3, 3, 129, 0], dtype=np.int64)
    features = extract(backbone, dataset, rows, GRAY, device="cpu", batch=2, batches=batches)  # type: ignore[arg-type]
    expected = backbone(torch.from_numpy(dataset.images[rows])).detach().numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-6)
    assert features.dtype == np.float32
    assert not backbone.training
    assert backbone.norm.num_batches_tracked == 0


def test_no_row_is_refused() -> None:
    with pytest.raises(UserError, match="no image"):
        extract(Moments(), FakeDataset(), np.zeros(0, np.int64), GRAY, device="cpu", batches=batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_classes_that_differ_are_told_apart(protocol: str) -> None:
    result = run(FakeDataset(), protocol=protocol)
    assert (result.n_train, result.n_test, result.accuracy, result.auroc) == (60, 40, 1.0, 1.0)
    assert result.classes == ["dark", "grey", "bright"]
    assert result.dataset_sha256 == FakeDataset.sha256
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_k_is_reported_as_it_was_used() -> None:
    assert run(FakeDataset()).parameters == {"k": 60, "temperature": 0.07}
    assert run(FakeDataset(), k=9).parameters["k"] == 9


def test_C_is_chosen_on_val_only_where_there_is_one() -> None:
    with_val, without = (run(FakeDataset(s), protocol="linear") for s in (("train", "val", "test"), ("train", "test")))
    assert (with_val.n_val, with_val.parameters["chosen_on"]) == (30, "val")
    assert (without.n_val, without.parameters["chosen_on"], without.parameters["C"]) == (0, "default", 1.0)


def test_a_val_split_that_is_measured_on_chooses_nothing() -> None:
    assert run(FakeDataset(), protocol="linear", test_split="val").parameters["chosen_on"] == "default"


def test_images_without_a_label_are_left_out_and_counted() -> None:
    dataset = FakeDataset()
    dataset.of_class[[0, 1, 95, 60]] = -1
    result = run(dataset, protocol="linear")
    assert result.excluded == {"train": 2, "test": 1, "val": 1}
    assert (result.n_train, result.n_val, result.n_test) == (58, 29, 39)


def test_a_val_split_without_any_label_is_not_used_and_shows() -> None:
    dataset = FakeDataset()
    dataset.of_class[60:90] = -1
    result = run(dataset, protocol="linear")
    assert (result.n_val, result.excluded["val"], result.parameters["chosen_on"]) == (0, 30, "default")


def test_names_of_the_vocabulary_that_no_image_has_are_no_classes() -> None:
    dataset = FakeDataset()
    expected = run(dataset)
    dataset.vocabulary = ("CT", "dark", "MR", "grey", "bright", "US")  # type: ignore[assignment]
    dataset.of_class = np.array([1, 3, 4], dtype=np.int32)[dataset.of_class]
    dataset.of_class[60:90] = -1
    result = run(dataset)
    assert result.classes == expected.classes == ["dark", "grey", "bright"]
    assert (result.accuracy, result.auroc, result.aupr) == (expected.accuracy, expected.auroc, expected.aupr)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_missing_in_a_split_is_refused_before_images_are_read(split: str) -> None:
    dataset = FakeDataset()
    rows = dataset.rows(split)
    dataset.of_class[rows[dataset.of_class[rows] == 1]] = -1

    def unread(*args: Any, **settings: Any) -> Iterator[Tensor]:
        raise AssertionError("images were read")

    with pytest.raises(UserError, match=f"class 'grey' in label 'class' of split '{split}'"):
        run(dataset, batches=unread)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "knm"}, "did you mean 'knn'"),
        ({"test_split": "train"}, "must not be the train split"),
        ({"test_split": "tset"}, "no split 'tset'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(FakeDataset(), **options)


def test_the_table_shows_the_difference_to_the_random_backbone() -> None:
    trained = run(FakeDataset())
    random = trained.model_copy(update={"accuracy": 0.25})
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table(trained, random))
    text = console.export_text()
    assert "1.0000" in text
    assert "0.2500" in text
    assert "+0.7500" in text
    assert "k 60" in text


def test_results_on_other_data_are_not_compared() -> None:
    trained = run(FakeDataset())
    with pytest.raises(UserError, match="dataset_sha256"):
        table(trained, trained.model_copy(update={"dataset_sha256": "0" * 64}))


def test_json_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(FakeDataset())
    path = tmp_path / "eval.json"
    write_json(path, {"trained": result}, {"step": 3})
    written = json.loads(path.read_text())
    assert Result(**written["trained"]) == result
    assert written["about"] == {"step": 3}
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {}, {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["eval.json"]


def test_json_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        write_json(tmp_path / "none" / "eval.json", {}, {})
