"""Each measure of a space against its equation, in plain loops over pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from medpretrain.evaluation import space
from medpretrain.evaluation.space import distance_histogram, neighbourhood, space_metrics
from medpretrain.evaluation.space_record import SpaceMetrics
from medpretrain.training import collapse

Array = np.ndarray


def distance(a: Array, b: Array) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def on_sphere(features_NVD: Array) -> Array:
    return features_NVD / np.linalg.norm(features_NVD, axis=2, keepdims=True)


def sad(f: Array) -> float:
    each = [np.mean([distance(image[a], image[b]) for a, b in combinations(range(len(image)), 2)]) for image in f]
    return float(np.mean(each))


def saa(f: Array) -> float:
    images, views, _ = f.shape
    hits = []
    for i in range(images):
        for a in range(views):
            negatives = [distance(f[i, a], f[j, b]) for j in range(images) if j != i for b in range(views)]
            hits += [distance(f[i, a], f[i, b]) < min(negatives) - 1e-9 for b in range(views) if b != a]
    return float(np.mean(hits))


def cad(f: Array, labels: Array) -> float:
    means = []
    for k in np.unique(labels):
        views = f[labels == k].reshape(-1, f.shape[2])
        pairs = [(i, j) for i in range(len(views)) for j in range(i, len(views))]
        assert len(pairs) == math.comb(len(views) + 1, 2)
        means.append(sum(distance(views[i], views[j]) for i, j in pairs) / len(pairs))
    return float(np.mean(means))


def cac(f: Array, labels: Array) -> float:
    """By probability: the mean over all orders in which equally far views may be sorted."""
    views, of_view = f.reshape(-1, f.shape[2]), np.repeat(labels, f.shape[1])
    near = max(1, len(views) * 5 // 100)
    parts = []
    for i in range(len(views)):
        others = sorted((round(distance(views[i], views[j]), 9), j) for j in range(len(views)) if j != i)
        border = others[near - 1][0]
        inside = [j for d, j in others if d < border]
        tied = [j for d, j in others if d == border]
        share = (near - len(inside)) / len(tied)
        agree = sum(of_view[j] == of_view[i] for j in inside) + share * sum(of_view[j] == of_view[i] for j in tied)
        parts.append(agree / near)
    return float(np.mean(parts))


def gpu(f: Array) -> float:
    first = f[:, 0]
    pairs = [(k, j) for k in range(len(first)) for j in range(k, len(first))]
    assert len(pairs) == math.comb(len(first) + 1, 2)
    return math.log(sum(math.exp(-(distance(first[k], first[j]) ** 2)) for k, j in pairs) / len(pairs))


def measured(f: Array, labels: Array) -> SpaceMetrics:
    return space_metrics(torch.from_numpy(f), labels)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "many blocks":
        monkeypatch.setattr(space, "_ELEMENTS", 200)  # a few rows at a time, and the last block a shorter one
    return


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("views", [2, 3])
def test_every_measure_equals_its_equation_in_loops(views: int) -> None:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    labels = np.array([0] * 14 + [1] * 5 + [2])  # imbalanced, and one image alone in its class
    of_image = 0.8 * rng.normal(size=(20, 1, 5)) + labels[:, None, None]
    features = (of_image + 0.6 * rng.normal(size=(20, views, 5))) * rng.uniform(0.1, 9, size=(20, views, 1))
    f, found = on_sphere(features), measured(features, labels)
    assert found.sad == pytest.approx(sad(f), abs=1e-12)
    assert found.saa == pytest.approx(saa(f), abs=1e-12)
    assert found.cad == pytest.approx(cad(f, labels), abs=1e-12)
    assert found.cac == pytest.approx(cac(f, labels), abs=1e-12)
    assert found.gpu == pytest.approx(gpu(f), abs=1e-12)
    assert 0 < found.saa < 1
    assert neighbourhood(20 * views) > 1


@pytest.mark.usefixtures("blocks")
def test_ties_are_no_hits_and_share_their_places() -> None:
    a, b, c = np.eye(3)
    # Image 1 has a view where image 0 has both; images 3 and 4 are the same twice, of two classes.
    features = np.stack([[a, a], [a, b], [c, c], [-b, -b], [-b, -b]] * 6)
    labels = np.array([0, 1, 1, 0, 1] * 6)
    found = measured(features, labels)
    assert found.saa == saa(features) == 0
    assert found.cac == pytest.approx(cac(features, labels), abs=1e-12)
    assert found.cad == pytest.approx(cad(features, labels), abs=1e-7)
    turned = np.random.default_rng(0).permutation(len(labels))
    assert measured(features[turned], labels[turned]).cac == pytest.approx(found.cac, abs=1e-12)


def test_a_positive_as_near_as_a_negative_is_no_hit() -> None:
    features = np.array([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])  # all neighbours at right angles
    assert measured(features, np.array([0, 1])).saa == saa(features) == 0


@pytest.mark.usefixtures("blocks")
def test_the_measures_of_training_are_the_same_ones() -> None:
    features = torch.from_numpy(np.random.default_rng(3).normal(size=(30, 2, 8)))
    found, training = space_metrics(features, np.arange(30) % 2), collapse.representation(features)
    assert {name: getattr(found, name) for name in training} == pytest.approx(training, abs=1e-12)
    more = torch.cat([features, features[:, :1]], dim=1)
    thrice = [collapse.alignment(more[:, i], more[:, j]).item() for i, j in combinations(range(3), 2)]
    assert space_metrics(more, np.arange(30) % 2).alignment == pytest.approx(np.mean(thrice), abs=1e-12)


def test_identical_features_are_a_collapse_and_no_error() -> None:
    labels = np.array([0] * 15 + [1] * 5)
    found = measured(np.full((20, 2, 4), 0.3), labels)
    assert (found.sad, found.saa, found.cad, found.gpu, found.alignment, found.uniformity) == (0, 0, 0, 0, 0, 0)
    assert found.cac == pytest.approx((15 * 29 + 5 * 9) / 39 / 20)  # the part of the own class among all others
    assert found.feature_std == pytest.approx(0, abs=1e-12)
    assert found.rankme == pytest.approx(1, abs=1e-4)
    histogram = distance_histogram(torch.full((20, 2, 4), 0.3))
    assert (histogram.positive, histogram.negative) == ([20], [math.comb(40, 2) - 20])


def test_what_needs_two_views_or_two_classes_is_none() -> None:
    features = np.random.default_rng(1).normal(size=(6, 1, 3))
    found = measured(features, np.array([0, 0, 0, 1, 1, 1]))
    assert (found.sad, found.saa, found.alignment) == (None, None, None)
    assert found.cac is not None
    histogram = distance_histogram(torch.from_numpy(features))
    assert sum(histogram.positive) == 0
    assert histogram.positive_mean is None
    assert measured(features, np.zeros(6, int)).cac is None
    assert measured(features, np.zeros(6, int)).cad == pytest.approx(cad(on_sphere(features), np.zeros(6, int)))


def test_one_image_a_class_has_a_class_distance_of_its_views() -> None:
    features = np.random.default_rng(2).normal(size=(3, 2, 4))
    assert measured(features, np.arange(3)).cad == pytest.approx(cad(on_sphere(features), np.arange(3)), abs=1e-12)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f[:1], "between images"),
        (lambda f: np.where(np.arange(24).reshape(3, 2, 4) == 7, np.nan, f), "not finite"),
        (lambda f: np.where(np.arange(24).reshape(3, 2, 4) < 4, 0.0, f), "1 of 6 features are 0"),
    ],
)
def test_features_that_have_no_place_are_refused(spoil, message: str) -> None:
    features = spoil(np.random.default_rng(0).normal(size=(3, 2, 4)))
    with pytest.raises(UserError, match=message):
        measured(features, np.arange(3)[: len(features)])


@pytest.mark.usefixtures("blocks")
def test_the_histogram_counts_every_pair_once_unnormalised() -> None:
    features = 3 * np.random.default_rng(5).normal(size=(12, 3, 6)) + 40
    found = distance_histogram(torch.from_numpy(features), bins=50)
    flat = features.reshape(-1, 6)
    positive, negative = [], []
    for i, j in combinations(range(36), 2):
        (positive if i // 3 == j // 3 else negative).append(distance(flat[i], flat[j]))
    assert found.positive == np.histogram(positive, found.edges)[0].tolist()
    assert found.negative == np.histogram(negative, found.edges)[0].tolist()
    assert (sum(found.positive), sum(found.negative)) == (36, math.comb(36, 2) - 36)
    assert found.positive_mean == pytest.approx(np.mean(positive))
    assert found.negative_mean == pytest.approx(np.mean(negative))
    assert found.negative[-1] + found.positive[-1] > 0
    assert len(found.positive) > 20  # the bound is not far off
