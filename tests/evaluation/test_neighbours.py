from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from medpretrain.evaluation import neighbours
from medpretrain.evaluation.neighbours import nearest_images, some_of_each, stratified


@pytest.mark.parametrize("elements", [2**23, 45])
def test_the_nearest_are_those_of_a_sort_of_all_cosines(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ELEMENTS", elements)
    features = np.random.default_rng(0).normal(size=(20, 5)) * np.arange(1, 21)[:, None]
    found = nearest_images(torch.from_numpy(features), list(range(20)), 6)
    for query, near in enumerate(found):
        lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(features[query])
        cosines = features @ features[query] / lengths
        expected = [place for place in np.argsort(-cosines) if place != query][:6]
        assert [place for place, _ in near] == expected
        assert [value for _, value in near] == pytest.approx(cosines[expected])


def test_an_image_and_its_patient_are_passed_over_when_asked() -> None:
    features = torch.ones(5, 3)  # all equally near: the lower place first
    patients = np.array([7, 7, 8, 8, 9])
    assert [place for place, _ in nearest_images(features, [1], 9)[0]] == [0, 2, 3, 4]
    assert [place for place, _ in nearest_images(features, [1], 9, patients_N=patients)[0]] == [2, 3, 4]
    assert nearest_images(features[:2], [1], 9, patients_N=patients[:2]) == [[]]


def test_no_neighbour_and_no_number_are_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        nearest_images(torch.ones(3, 2), [0], 0)
    with pytest.raises(UserError, match="not finite"):
        nearest_images(torch.tensor([[1.0], [torch.nan]]), [0], 1)


@pytest.mark.parametrize("at_most", [3, 4, 10, 57, 99])
def test_a_stratified_part_has_every_class_in_its_share(at_most: int) -> None:
    labels = np.random.default_rng(0).permutation([0] * 90 + [1] * 9 + [2])
    chosen = stratified(labels, at_most, seed=0)
    counts = np.bincount(labels[chosen], minlength=3)
    assert len(np.unique(chosen)) == at_most
    assert (chosen == np.sort(chosen)).all()
    assert counts.min() >= 1
    assert (counts <= [90, 9, 1]).all()
    assert abs(counts[0] - 0.9 * at_most) <= 2
    assert (stratified(labels, at_most, seed=0) == chosen).all()


def test_a_part_as_large_as_the_whole_is_the_whole_and_one_too_small_is_refused() -> None:
    assert stratified(np.array([0, 1, 0]), 3, seed=0).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="cannot stand for 3"):
        stratified(np.arange(3), 2, seed=0)


def test_some_of_each_class_and_all_of_a_small_one() -> None:
    labels = np.array([2, 0, 0, 2, 0, 1])
    assert labels[some_of_each(labels, 2, seed=4)].tolist() == [0, 0, 1, 2, 2]
