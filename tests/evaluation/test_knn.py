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


def nearest(train: Tensor, test: Tensor, k: int) -> list[list[int]]:
    """The rows of the k most similar, of equal ones the lower, by sorting all similarities of float64."""
    length = torch.linalg.vector_norm(train.double(), dim=1)
    similar = test.double() @ train.double().T / length / torch.linalg.vector_norm(test.double(), dim=1)[:, None]
    return similar.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values.tolist()


def voters(train: Tensor, test: Tensor, k: int) -> list[list[int]]:
    """The rows that vote: each training image is a class of its own, and all votes weigh about the same."""
    scores = knn_scores(train, torch.arange(len(train)), test, len(train), k=k, temperature=1e3)
    assert torch.allclose(scores[scores > 0], torch.tensor(1 / k, dtype=torch.float64), rtol=1e-2)
    return [row.nonzero()[:, 0].tolist() for row in scores]


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("elements", [2048, 2**24])
def test_the_neighbours_among_many_are_those_of_sorting_all(
    k: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(2003, 24, generator=generator) * torch.logspace(-3, 3, 2003)[:, None]
    test = torch.randn(13, 24, generator=generator)
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", elements)
    assert voters(train, test, k) == nearest(train, test, k)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_training_images_and_of_cores_gives_the_same_neighbours(threads: int) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 63, 64, 65, 511, 512, 513, 577, 600, 1025, 4097):
            train, test = torch.randn(count, 6, generator=generator), -torch.rand(7, 6, generator=generator)
            for k in {1, min(2, count), min(9, count)}:
                assert voters(train, test, k) == nearest(train, test, k), (count, k)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_no_test_image_gives_no_scores() -> None:
    assert knn_scores(torch.eye(2), torch.tensor([0, 1]), torch.zeros(0, 2), 2).shape == (0, 2)


def test_neighbours_that_float32_cannot_tell_apart_are_told_apart() -> None:
    """Similarities differ by 1e-9 and less, where float32 sees steps of 6e-8, and the far ones are in the way."""
    seed = secrets.randbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    angles = 1e-3 + 1e-6 * torch.randperm(300, generator=generator).double() / 300
    near = torch.stack([torch.cos(angles), torch.sin(angles), *[torch.zeros_like(angles)] * 6], dim=1)
    far = torch.randn(5000, 8, generator=generator).double()
    mixed = torch.randperm(5300, generator=generator)
    train = torch.cat([near, far])[mixed]
    test = torch.eye(8, dtype=torch.float64)[:1]
    gaps = (test @ near.T)[0].sort().values.diff()
    assert gaps[gaps > 0].min() < 1e-11
    assert gaps.max() < 1e-8
    assert voters(train, test, 40) == nearest(train, test, 40)


@pytest.mark.parametrize("k", [3, 50])
def test_copies_are_equal_whatever_stands_between_them(k: int) -> None:
    """Each of 31 vectors stands 101 times: the first of its copies vote."""
    generator = torch.Generator().manual_seed(5)
    train = torch.randn(31, 48, generator=generator).repeat(101, 1)
    test = train[:31] * 7
    expected = [[row + 31 * copy for copy in range(k)] for row in range(31)]
    assert voters(train, test, k) == expected


def test_images_that_are_all_alike_are_searched_too() -> None:
    """A collapsed network: every image may be a neighbour of every other."""
    generator = torch.Generator().manual_seed(6)
    train = 1 + 1e-4 * torch.randn(3000, 16, generator=generator)
    test = 1 + 1e-4 * torch.randn(4, 16, generator=generator)
    assert voters(train, test, 9) == nearest(train, test, 9)


def test_products_that_may_be_rounded_to_fewer_bits_change_nothing() -> None:
    generator = torch.Generator().manual_seed(7)
    train, test = torch.randn(2000, 16, generator=generator), torch.randn(5, 16, generator=generator)
    expected = knn_scores(train, torch.arange(2000), test, 2000, k=9)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(knn_scores(train, torch.arange(2000), test, 2000, k=9), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_feature_without_length_is_similar_to_nothing() -> None:
    train = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    scores = knn_scores(train, torch.tensor([0, 1, 2]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 3, k=2, temperature=1.0)
    assert scores[0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0.0])
    assert scores[1].tolist() == pytest.approx([0.5, 0.5, 0.0])


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
