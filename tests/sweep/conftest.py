"""A stand-in for the `medpretrain` command, and evaluations for it to leave behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from medpretrain.evaluation.metrics import Metrics
from medpretrain.evaluation.results import DataRecord, Evaluation, Interval, SourceRecord, Summary, Unit

STAND_IN = Path(__file__).with_name("stand_in.py")
SWEEP = """\
name: tiny
about: a sweep for tests
recipe: {recipe}
grid:
  - {{name: batch size, set: ["train.global_batch={{}}"], values: [4, 6]}}
evaluate: [{{protocol: linear, variant: exact}}]
"""


def _evaluation(accuracy: float, fractions: tuple[float, ...] = (100.0,)) -> Evaluation:
    """An evaluation of nothing, with this accuracy."""
    scalars = {"accuracy": accuracy, "balanced_accuracy": 0.5, "auroc": 0.5, "aupr": 0.5, "sensitivity": 0.5}
    scalars |= {"specificity": 0.5, "f1": 0.5, "brier": 0.5, "ece": 0.1}
    unit = Unit(number=0, fraction=100.0, seed=0, repeat=0, fold=None, n_train=4, n_val=0, n_test=4, parameters={},
                metrics=Metrics(**scalars, per_class=[], confusion=[], calibration=[]))  # fmt: skip
    interval = {"accuracy": Interval(low=accuracy - 0.05, high=accuracy + 0.04)}
    return Evaluation(
        protocol="linear", variant="exact", parameters={},
        source=SourceRecord(name="x", kind="run", sha256="0", architecture="resnet10t", about={}),
        data=DataRecord(name="d", sha256="1", label="class", classes=["a", "b"], train_split="train", test_split="test",
                        test_name="d", test_sha256="1", train_counts=[2, 2], test_counts=[2, 2], left_out={},
                        patients="unknown"),
        folds=0, repeats=1, seeds=[0], units=[unit],
        summaries=[Summary(fraction=one, units=1, mean=scalars, sd=None, interval=interval) for one in fractions],
        seconds=1.0, device="cpu", medpretrain_version="0",
    )  # fmt: skip


@pytest.fixture
def evaluation():
    return _evaluation


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The words that start the stand-in; it appends each of its starts to `calls.jsonl`."""
    (tmp_path / "evaluation.json").write_text(_evaluation(0.5).model_dump_json())
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    return (sys.executable, str(STAND_IN))


@pytest.fixture
def calls(tmp_path):
    """calls() -> what the stand-in was started with since the last call."""
    seen = 0

    def calls() -> list[list[str]]:
        nonlocal seen
        file = tmp_path / "calls.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        new, seen = lines[seen:], len(lines)
        return [json.loads(line) for line in new]

    return calls
