from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.evaluation.evaluate import evaluate
from medpretrain.evaluation.metrics import SCALARS, scalars
from medpretrain.evaluation.plan import choose_images
from medpretrain.evaluation.protocols import Asked, FineTune, Knn, Linear
from medpretrain.evaluation.results import Evaluation, Predictions
from medpretrain.evaluation.show import table
from medpretrain.evaluation.source import Source
from medpretrain.models.preprocessing import Preprocessing

GRAY = Preprocessing(size=16, channels=1, mean=(0.5,), std=(0.25,))


class Moments(nn.Module):
    """Brightness and contrast, which tell `dark` from `light`; BatchNorm shows whether eval mode was set."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.stack([x.mean(dim=(1, 2, 3)), x.std(dim=(1, 2, 3))], dim=1)


def tiny(name: str = "tiny", backbone: nn.Module | None = None) -> Source:
    return Source(name, "run", (backbone or Moments()).eval(), GRAY, "moments", f"{len(name):064x}", {"seed": 0})


def run(
    dataset: Dataset, asked: Asked, *, source: Source | None = None, folds: int = 0, **options: Any
) -> tuple[Evaluation, Predictions]:
    images = choose_images(dataset, label="grade", folds=folds)
    return evaluate(asked, source or tiny(), images, label="grade", resamples=options.pop("resamples", 100), **options)


@pytest.mark.parametrize(
    "asked", [Knn(k=5), Linear(), Linear(variant="amimv"), FineTune(variant="plain")], ids=lambda one: one.variant
)
def test_classes_that_differ_are_told_apart(graded: Dataset, asked: Asked) -> None:
    source = tiny()
    evaluation, predictions = run(graded, asked, source=source)
    (unit,) = evaluation.units
    assert unit.metrics.auroc > 0.95
    assert unit.n_train == graded.info.splits["train"]
    assert unit.n_val == graded.info.splits["val"]
    assert unit.n_test == len(predictions.row_R) == graded.info.splits["test"]
    assert evaluation.data.patients == "known"
    assert evaluation.data.classes == ["dark", "light"]
    assert evaluation.source.name == "tiny"
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    assert source.backbone.norm.num_batches_tracked == 0  # type: ignore[union-attr,operator]


def test_the_scores_that_are_kept_give_the_numbers_that_are_written(graded: Dataset) -> None:
    evaluation, predictions = run(graded, Knn(k=5), folds=3)
    assert [unit.fold for unit in evaluation.units] == [0, 1, 2]
    for unit in evaluation.units:
        part = predictions.of_unit(unit.number)
        again = scalars(part.scores_RK, part.label_R)
        assert {name: getattr(unit.metrics, name) for name in SCALARS} == pytest.approx(again)
    (summary,) = evaluation.summaries
    assert summary.mean["auroc"] == pytest.approx(np.mean([unit.metrics.auroc for unit in evaluation.units]))
    assert summary.interval["auroc"].low <= summary.mean["auroc"] <= summary.interval["auroc"].high
    assert sorted(predictions.row_R) == list(range(len(graded)))


def test_k_and_C_are_written_as_they_were_used(graded: Dataset) -> None:
    assert run(graded, Knn())[0].units[0].parameters == {"k": graded.info.splits["train"], "temperature": 0.07}
    own = run(graded, Linear())[0].units[0].parameters
    assert own["chosen_on"] == "val"
    of_fold = run(graded, Linear(), folds=2)[0].units[0].parameters
    assert (of_fold["chosen_on"], of_fold["C"]) == ("default", 1.0)


def test_a_repeat_has_other_random_numbers_and_the_same_folds(graded: Dataset) -> None:
    evaluation, predictions = run(graded, Linear(variant="modan"), folds=2, repeats=2, resamples=0)
    first, again = predictions.of_unit(0), predictions.of_unit(2)
    np.testing.assert_array_equal(first.row_R, again.row_R)
    assert not np.array_equal(first.scores_RK, again.scores_RK)
    assert evaluation.summaries[0].interval == {}
    same = run(graded, Linear(variant="modan"), folds=2, repeats=2, resamples=0)[1]
    np.testing.assert_array_equal(same.scores_RK, predictions.scores_RK)


def test_features_that_are_not_finite_are_refused(graded: Dataset) -> None:
    class Broken(Moments):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    with pytest.raises(UserError, match="not finite"):
        run(graded, Knn(), source=tiny("broken", Broken()))


def test_an_interval_that_the_patients_cannot_give_is_refused_before_an_image_is_read(
    graded: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: Any, **settings: Any) -> None:
        raise AssertionError("features were taken")

    monkeypatch.setattr("medpretrain.evaluation.evaluate.features", unread)
    with pytest.raises(UserError, match="no 95 % interval"):
        run(graded, Knn(), folds=20)


def test_the_table_shows_the_difference_and_what_must_be_known(small_dataset: Path) -> None:
    images = choose_images(Dataset.open(small_dataset), label="class")
    done = [evaluate(Knn(k=3), tiny(name), images, label="class", resamples=100)[0] for name in ("trained", "random")]
    worse = done[1].summaries[0].model_copy(update={"mean": {**done[1].summaries[0].mean, "accuracy": 0.25}})
    done[1] = done[1].model_copy(update={"summaries": [worse]})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(done))
    text = console.export_text()
    assert f"{done[0].summaries[0].mean['accuracy'] - 0.25:+.4f}" in text
    assert "k 3" in text
    assert "patients are unknown" in text
    other = done[0].model_copy(update={"parameters": {"k": 4}})
    with pytest.raises(UserError, match="compare like with like"):
        table([done[0], other])


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(graded: Dataset, run_ranks: Any, tmp_path: Path) -> None:
    """Rows and folds are shared out, so each rank works on images of its own."""
    for world in (1, 2):
        options = ["--label", "grade", "--folds", "2", "--repeats", "2", "--variant", "modan", "--resamples", "100"]
        options += ["--size", "32", "--device", "cpu", "--no-cache", "--out", str(tmp_path / str(world))]
        run_ranks(["-m", "medpretrain", "evaluate", "linear", "random:resnet10t", str(graded.path), *options], world)
    one, two = (Evaluation.model_validate_json(next((tmp_path / w).glob("*.json")).read_text()) for w in ("1", "2"))
    assert one.comparable() == two.comparable()
    for alone, shared in zip(one.units, two.units, strict=True):
        assert alone.metrics.auroc == pytest.approx(shared.metrics.auroc, abs=1e-6)
        assert alone.model_dump(exclude={"metrics"}) == shared.model_dump(exclude={"metrics"})
