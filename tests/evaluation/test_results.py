from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from medpretrain.evaluation.intervals import summarise
from medpretrain.evaluation.metrics import metrics
from medpretrain.evaluation.results import DataRecord, Evaluation, Predictions, SourceRecord, Unit, read, write

CLASSES = ["benign", "malignant"]


def made(*, seed: int = 0, name: str = "run", units: int = 2, **about: Any) -> tuple[Evaluation, Predictions]:
    """Two repeats of one classifier on 40 images of 20 patients."""
    draw = np.random.default_rng(seed)
    labels = (np.arange(40) // 2 % 2).astype(np.int32)
    parts, found = [], []
    for number in range(units):
        high = np.clip(draw.normal(0.35 + 0.3 * labels, 0.2), 0.01, 0.99)
        scores = np.stack([1 - high, high], axis=1)
        parts.append(
            Predictions(np.full(40, number, np.int32), np.arange(40), np.arange(40) // 2, labels, scores),
        )
        found.append(
            Unit(
                number=number,
                fraction=100,
                seed=0,
                repeat=number,
                fold=None,
                n_train=80,
                n_val=0,
                n_test=40,
                parameters={"k": 5},
                metrics=metrics(scores, labels, CLASSES),
            )
        )
    predictions = Predictions.joined(parts)
    evaluation = Evaluation(
        protocol="linear",
        variant="modan",
        parameters={},
        source=SourceRecord(name=name, kind="run", sha256=f"{seed:064x}", architecture="resnet18", about=about),
        data=DataRecord(
            name="breast",
            sha256="a" * 64,
            label="class",
            classes=CLASSES,
            train_split="train",
            test_split="test",
            test_name="breast",
            test_sha256="a" * 64,
            train_counts=[40, 40],
            test_counts=[20, 20],
            left_out={"train": 0, "test": 0},
            patients="known",
        ),
        folds=0,
        repeats=units,
        seeds=[0],
        units=found,
        summaries=summarise(found, predictions, CLASSES, resamples=100),
        seconds=1.0,
        device="cpu",
        medpretrain_version="0",
    )
    return evaluation, predictions


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    evaluation, predictions = made()
    path = write(tmp_path / "new", evaluation, predictions)
    again, scores = read(path)
    assert again == evaluation
    for name in ("unit_R", "row_R", "patient_R", "label_R", "scores_RK"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(predictions, name))
    write(tmp_path / "new", evaluation, predictions)
    assert len(list((tmp_path / "new").iterdir())) == 2  # the same evaluation replaces its files


def test_another_source_has_another_file_and_compares(tmp_path: Path) -> None:
    (one, _), (other, _) = made(), made(seed=1)
    assert one.file_stem() != other.file_stem()
    assert one.comparable() == other.comparable()
    changed = one.model_copy(update={"data": one.data.model_copy(update={"sha256": "b" * 64})})
    assert changed.comparable() != one.comparable()


def test_a_newer_version_a_changed_record_and_missing_scores_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *made())
    content = json.loads(path.read_text())

    def refused(change: dict[str, Any], message: str) -> None:
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            read(path)

    refused({"version": 3}, "has version 3")
    refused({"format": "theirs"}, "is no 'medpretrain evaluation' file")
    refused({"folds": "many"}, "was changed: folds")
    units = [content["units"][0] | {"n_test": 39}, content["units"][1]]
    refused({"units": units}, "does not have the images that")
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read(path)
    path.write_text(json.dumps(content))
    next(tmp_path.glob("*.parquet")).unlink()
    with pytest.raises(UserError, match="is missing"):
        read(path)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, *made())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, *made())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert path.name in before
