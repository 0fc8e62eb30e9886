from __future__ import annotations

import math
import secrets

import pytest
import torch
from torch import Tensor

from data_prep.errors import UserError
from medpretrain.evaluation import knn
from medpretrain.evaluation.knn import knn_scores


def reference(train: Tensor, labels: Tensor, test: Tensor, n_classes: int, k: int, temperature: float) -> Tensor:
    """Wu et al. 2018, section 3.4, one image and one neighbour at a time, in Python's floats."""
    rows = []
    for probe in test.double().tolist():
        ranked = []
        for row, known in enumerate(train.double().tolist()):
            dot = sum(a * b for a, b in zip(probe, known, strict=True))
            lengths = math.sqrt(sum(a * a for a in probe)) * math.sqrt(sum(b * b for b in known))
            ranked.append((-dot / lengths, row))
        votes = [0.0] * n_classes
        for negative, row in sorted(ranked)[:k]:
            votes[int(labels[row])] += math.exp(-negative / temperature)
        rows.append([vote / sum(votes) for vote in votes])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 7, 40, 200])
@pytest.mark.parametrize("elements", [1, 2**24])
def test_knn_equals_the_definition_whatever_the_chunks(k: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(40, 6, generator=generator) * 5
    test = torch.randn(11, 6, generator=generator)
    labels = torch.randint(0, 3, (40,), generator=generator)
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", elements)
    scores = knn_scores(train, labels, test, 3, k=k, temperature=0.07)
    torch.testing.assert_close(scores, reference(train, labels, test, 3, min(k, 40), 0.07), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(11, dtype=torch.float64))


def test_of_equal_neighbours_at_the_last_place_the_first_rows_vote() -> None:
    train = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    scores = knn_scores(train, torch.tensor([0, 1, 0, 2]), torch.tensor([[2.0, 0.0]]), 3, k=2)
    assert scores.tolist() == [[0.5, 0.5, 0.0]]


def test_a_small_temperature_overflows_nothing() -> None:
    scores = knn_scores(torch.eye(3), torch.tensor([0, 1, 2]), torch.eye(3), 3, temperature=1e-4)
    assert torch.equal(scores, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "neighbour"), ({"temperature": 0.0}, "positive"), ({"temperature": -1.0}, "pos")],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        knn_scores(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), 2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["train", "test"])
def test_features_that_are_not_finite_are_refused(where: str) -> None:
    features = {"train": torch.eye(2), "test": torch.eye(2)}
    features[where][0, 0] = torch.nan
    with pytest.raises(UserError, match="finite"):
        knn_scores(features["train"], torch.tensor([0, 1]), features["test"], 2)
