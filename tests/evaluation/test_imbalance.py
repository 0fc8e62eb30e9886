from __future__ import annotations

import math

import pytest
from medmnist import INFO

from data_prep.errors import UserError
from medpretrain.evaluation.imbalance import _category, imbalance

# Training images of each class of MedMNIST (3.0), in the order of its labels.
COUNTS = {
    "pathmnist": [9366, 9509, 10360, 10401, 8006, 12182, 7886, 9401, 12885],
    "bloodmnist": [852, 2181, 1085, 2026, 849, 993, 2330, 1643],
    "octmnist": [33484, 10213, 7754, 46026],
    "breastmnist": [147, 399],
    "pneumoniamnist": [1214, 3494],
    "organamnist": [1956, 1390, 1357, 1474, 3963, 3817, 6164, 3919, 3929, 3031, 3561],
    "retinamnist": [486, 128, 206, 194, 66],
    "tissuemnist": [53075, 7814, 5866, 15406, 11789, 7705, 39203, 24608],
    "dermamnist": [228, 359, 769, 80, 779, 4693, 99],
}
# amimv.txt, Table 1: IR, CV, NE, GI, RCR, class.
TABLE = {
    "pathmnist": ("1.63", "0.16", "0.99", "0.08", "8.76", "FB"),
    "bloodmnist": ("2.74", "0.41", "0.96", "0.21", "7.09", "FB"),
    "octmnist": ("5.93", "0.75", "0.83", "0.35", "7.95", "FB"),
    "breastmnist": ("2.71", "0.65", "0.84", "0.23", "26.92", "PI"),
    "pneumoniamnist": ("2.87", "0.68", "0.82", "0.24", "25.78", "PI"),
    "organamnist": ("4.54", "0.47", "0.95", "0.24", "3.92", "PI"),
    "organcmnist": ("5.01", "0.56", "0.94", "0.25", "4.58", "PI"),
    "organsmnist": ("5.64", "0.66", "0.93", "0.30", "4.40", "PI"),
    "retinamnist": ("7.36", "0.74", "0.87", "0.34", "6.11", "I"),
    "tissuemnist": ("9.04", "0.83", "0.86", "0.40", "3.54", "I"),
    "dermamnist": ("58.66", "1.65", "0.58", "0.64", "1.14", "I"),
}


def cut(value: float) -> str:
    """Two decimals, the rest cut off, as the table does: OCTMNIST's 46026 / 7754 = 5.9358 stands there as 5.93."""
    return f"{math.floor(value * 100 + 1e-9) / 100:.2f}"


@pytest.mark.parametrize("dataset", list(COUNTS))
def test_a_row_of_table_1_follows_from_the_published_counts(dataset: str) -> None:
    counts = COUNTS[dataset]
    assert sum(counts) == INFO[dataset]["n_samples"]["train"]
    found = imbalance(counts, [str(k) for k in range(len(counts))])
    row = (
        found.imbalance_ratio,
        found.coefficient_of_variation,
        found.normalized_entropy,
        found.gini,
        found.rare_class_ratio,
    )
    assert (*map(cut, row), found.category) == TABLE[dataset]


@pytest.mark.parametrize("dataset", list(TABLE))
def test_the_thresholds_give_every_dataset_of_the_table_its_class(dataset: str) -> None:
    ratio, *_, rarest, category = TABLE[dataset]
    assert _category(float(ratio), float(rarest), INFO[dataset]["n_samples"]["train"]) == category


@pytest.mark.parametrize("dataset", list(COUNTS))
def test_measures_equal_their_definitions_in_plain_loops(dataset: str) -> None:
    counts = COUNTS[dataset]
    K, N = len(counts), sum(counts)
    found = imbalance(counts, [str(k) for k in range(K)])
    assert found.gini == pytest.approx(sum(abs(a - b) for a in counts for b in counts) / (2 * K * N), abs=1e-12)
    assert found.normalized_entropy == pytest.approx(-sum(n / N * math.log(n / N, K) for n in counts), abs=1e-12)
    variance = sum((n - N / K) ** 2 for n in counts) / (K - 1)
    assert found.coefficient_of_variation == pytest.approx(math.sqrt(variance) / (N / K), abs=1e-12)


@pytest.mark.parametrize("n", [3, 10**6])
def test_equal_counts_are_balanced_at_any_size(n: int) -> None:
    found = imbalance([n] * 5, list("abcde"))
    assert found.category == "FB"
    assert (found.imbalance_ratio, found.coefficient_of_variation, found.gini) == (1.0, 0.0, 0.0)
    assert found.normalized_entropy == pytest.approx(1.0, abs=1e-12)
    assert found.normalized_entropy <= 1.0


def test_the_order_of_the_classes_changes_nothing_but_their_order() -> None:
    one, other = imbalance([5, 1, 9], list("abc")), imbalance([9, 5, 1], list("cab"))
    assert one.model_dump(exclude={"classes", "counts"}) == other.model_dump(exclude={"classes", "counts"})
    assert (one.classes, one.counts) == (["a", "b", "c"], [5, 1, 9])


def test_a_class_without_an_image_is_named() -> None:
    with pytest.raises(UserError, match="no training image of class 'b', 'd'"):
        imbalance([3, 0, 2, 0], list("abcd"))


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="at least two classes"):
        imbalance([3], ["a"])
