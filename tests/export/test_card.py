from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.dicom.windows import parse_window
from data_prep.errors import UserError
from medpretrain.evaluation.metrics import ClassMetrics, Metrics
from medpretrain.evaluation.results import (
    DataRecord,
    Evaluation,
    Interval,
    Predictions,
    SourceRecord,
    Summary,
    Unit,
    write,
)
from medpretrain.export import of_run
from medpretrain.export.card import model_card
from medpretrain.export.description import Window, describe
from medpretrain.export.difference import Difference
from medpretrain.export.provenance import NOT_PROVIDED, Provenance
from medpretrain.models.preprocessing import Preprocessing
from tests.export.kinds import PROVENANCE

DESCRIPTION = describe(Preprocessing(64, 1, (0.2,), (0.3,)), "resnet18", "timm", ("timm", "onnx"), None)
DIFFERENCES: Any = {"timm": Difference(0.0, 2.0, 0.0), "onnx": Difference(3e-6, 2.0, 2e-5)}


def evaluation(step: int = 1000, recipe: str = "1" * 64, kind: Any = "run", interval: bool = True) -> Evaluation:
    about: dict[str, Any] = {"step": step, "recipe_sha256": recipe}
    scalars = dict.fromkeys(("accuracy", "aupr", "sensitivity", "specificity", "f1", "brier", "ece"), 0.5)
    scores = {"auroc": 0.875, "balanced_accuracy": 0.75, **scalars}
    of_class = {"auroc": 0.5, "aupr": 0.5, "sensitivity": 0.5, "specificity": 0.5, "precision": 0.5, "f1": 0.5}
    per_class = [ClassMetrics(name=name, n=1, **of_class) for name in ("benign", "malignant")]
    metrics = Metrics(**scores, per_class=per_class, confusion=[[1, 0], [0, 1]], calibration=[])
    unit = {"number": 0, "fraction": 100.0, "seed": 0, "repeat": 0, "fold": None, "n_train": 8, "n_val": 0, "n_test": 2}
    return Evaluation(
        protocol="linear",
        variant="exact",
        parameters={},
        source=SourceRecord(name="run", kind=kind, sha256="5" * 64, architecture="resnet18", about=about),
        data=DataRecord(
            name="breast|mnist",
            sha256="6" * 64,
            label="class",
            classes=["benign", "malignant"],
            train_split="train",
            test_split="test",
            test_name="breast|mnist",
            test_sha256="6" * 64,
            train_counts=[4, 4],
            test_counts=[1, 1],
            left_out={},
            patients="known",
        ),
        folds=0,
        repeats=1,
        seeds=[0],
        units=[Unit(**unit, parameters={}, metrics=metrics)],
        summaries=[
            Summary(
                fraction=100.0,
                units=1,
                mean=scores,
                sd=None,
                interval={"auroc": Interval(low=0.8, high=0.9)} if interval else {},
            )
        ],
        seconds=1.0,
        device="cpu",
        medpretrain_version="0.1.0",
    )


def test_results_stand_in_the_card_with_their_intervals() -> None:
    card = model_card("demo", 512, DESCRIPTION, PROVENANCE, DIFFERENCES, [evaluation(), evaluation(interval=False)])
    row = "| linear (exact) | breast/mnist | class | 100 % | 2 | 0.875 | {} | 0.750 |"
    assert row.format("0.800 to 0.900") in card
    assert row.format(NOT_PROVIDED) in card
    assert "| performance with confidence intervals (12e, 23a; MI-CLAIM 3) | see Results |" in card


def test_what_is_not_known_is_said_to_be_not_provided() -> None:
    card = model_card("demo", 512, DESCRIPTION, Provenance(), DIFFERENCES)
    assert f"Performance on any task, overall and by subgroup: {NOT_PROVIDED}." in card
    for item in ("checkpoint SHA-256", "sample size (10)", "ethics approval and consent (17)", "fairness (14, 26)"):
        assert f"| {item} | {NOT_PROVIDED} |" in card
    assert "| None" not in card
    front = card.split("---")[1]
    assert front.strip().splitlines()[:3] == [
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "license: other",
    ]


def test_the_differences_are_absolute_and_relative() -> None:
    card = model_card("demo", 512, DESCRIPTION, PROVENANCE, DIFFERENCES)
    assert "| timm | model.safetensors | 0.0e+00 | 0.0e+00 |" in card
    assert "| onnx | model.onnx | 3.0e-06 | 1.5e-06 |" in card
    assert "model.pt2" not in card


def test_windows_of_ct_stand_in_card_and_json_with_their_hounsfield_units() -> None:
    shipped = parse_window("fixed").origin
    dataset: Any = {"windows": [shipped, "percentile:1,99", None]}
    trained: Any = SimpleNamespace(dataset=dataset, info=SimpleNamespace(dataset_sha256=("1" * 64, "2" * 64, "3" * 64)))
    found = of_run.windows(trained)
    assert found is not None
    assert [window.centre_width is None for window in found] == [False, True, True]
    said = describe(Preprocessing(64, 1, (0.2,), (0.3,), 16), "resnet18", "timm", ("timm",), found)
    first = json.loads(said.model_dump_json())["window"][0]
    assert first["window"] == shipped
    assert first["centre_width"]["lung"] == [-600, 1500]
    card = model_card("demo", 512, said, PROVENANCE, {"timm": DIFFERENCES["timm"]})
    assert "For CT, centre/width in Hounsfield units:" in card
    assert "windowed before: percentile:1,99 (dataset 222222222222)" in card
    assert "windowed before: none; the images came as they are" in card


def test_a_checkpoint_of_before_does_not_tell_its_windows() -> None:
    trained: Any = SimpleNamespace(dataset={}, info=SimpleNamespace(dataset_sha256=("1" * 64,)))
    assert of_run.windows(trained) is None
    assert isinstance(Window(dataset_sha256="1" * 64, window=None).centre_width, type(None))


def predictions(one: Evaluation) -> Predictions:
    scores = np.array([[0.6, 0.4], [0.1, 0.9]])
    return Predictions(np.zeros(2, np.int32), np.arange(2), np.arange(2), np.array([0, 1], np.int32), scores)


def test_only_evaluations_of_these_weights_are_taken_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    for number, one in enumerate(
        [evaluation(), evaluation(step=500), evaluation(recipe="9" * 64), evaluation(kind="random")]
    ):
        one = one.model_copy(update={"source": one.source.model_copy(update={"sha256": str(number) * 64})})
        write(tmp_path / "evaluation", one, predictions(one))
    trained: Any = SimpleNamespace(
        folder=tmp_path, recipe=SimpleNamespace(sha256="1" * 64), info=SimpleNamespace(step=1000)
    )
    (found,) = of_run.evaluations(trained)
    assert found.source.sha256 == "0" * 64
    broken = next((tmp_path / "evaluation").glob("*.json"))
    broken.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        of_run.evaluations(trained)
