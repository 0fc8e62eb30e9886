"""Maps of a few images; UMAP compiles for seconds when it is first used, and is used in one test."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.errors import UserError
from medpretrain.evaluation.projection import project


def two_heaps(images: int = 30, dimensions: int = 8) -> np.ndarray:
    features = 0.1 * np.random.default_rng(0).normal(size=(images, dimensions)).astype(np.float32)
    features[: images // 2, 0] += 1
    features[images // 2 :, 1] += 1
    return features


def apart(places: np.ndarray) -> bool:
    """Whether every point's nearest is of its own heap."""
    distances = np.linalg.norm(places[:, None] - places, axis=2) + np.diag([np.inf] * len(places))
    half = len(places) // 2
    return all((distances[i].argmin() < half) == (i < half) for i in range(len(places)))


@pytest.mark.parametrize("name", ["tsne", "umap"])
def test_heaps_stay_heaps_and_a_seed_gives_one_map(name: str) -> None:
    features = two_heaps()
    places, about = project(name, features, 3)
    assert places.shape == (30, 2)
    assert apart(places)
    assert (project(name, features, 3)[0] == places).all()
    # Only directions count.
    scaled = features * np.random.default_rng(1).choice([0.5, 2.0, 8.0], size=(30, 1)).astype(np.float32)
    np.testing.assert_allclose(project(name, scaled, 3)[0], places, atol=1e-3)
    if name == "tsne":
        assert about["perplexity"] == pytest.approx(29 / 3)
    else:
        assert about["n_neighbors"] == 15


@pytest.mark.parametrize("shape", [(4, 8), (5, 1), (9, 2)])
def test_few_images_and_few_dimensions_are_drawn(shape: tuple[int, int]) -> None:
    places, _ = project("tsne", np.random.default_rng(0).normal(size=shape), 0)
    assert np.isfinite(places).all()
    assert places.shape == (shape[0], 2)


@pytest.mark.parametrize("name", ["tsne", "umap"])
def test_a_collapsed_space_is_one_point(name: str) -> None:
    features = np.full((10, 4), 0.7, np.float32) * np.linspace(1, 2, 10, dtype=np.float32)[:, None]
    places, about = project(name, features, 0)
    assert (places == 0).all()
    assert about["identical"] is True


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        ("pca", np.ones((9, 2)), "no projection 'pca'"),
        ("tsne", np.ones((3, 2)), "at least 4 images"),
        ("umap", np.full((9, 2), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name: str, features: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        project(name, features, 0)
