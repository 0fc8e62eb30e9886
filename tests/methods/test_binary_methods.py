"""Supervised Minority and Supervised Prototypes: what they refuse, which class is which, and where prototypes go."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import supervised_minority, supervised_prototypes
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.supcon import SupCon, SupConOptions
from medpretrain.methods.supervised_minority import SupervisedMinority, SupervisedMinorityOptions
from medpretrain.methods.supervised_prototypes import (
    SupervisedPrototypes,
    SupervisedPrototypesOptions,
    spherical_median,
)
from tests.methods.flat import Flat

UNEQUAL = TrainingSet(20, {"class": ("a", "empty", "b")}, {"class": (15, 0, 5)})
MINORITY, PROTOTYPES = SupervisedMinorityOptions(), SupervisedPrototypesOptions()
START = Progress(step=0, total=10, epoch=0.0)


def counted(*counts, names="abcdefgh"):
    return TrainingSet(sum(counts), {"class": tuple(names[: len(counts)])}, {"class": counts})


def batch(labels):
    size = len(labels)
    return Batch(
        3, seed=0, size=size, first=0, micro=[], labels={"class": torch.tensor(labels)}, samples=torch.arange(size)
    )


def outputs_of(method, count=4):
    torch.manual_seed(1)
    return method({"crop": [torch.randn(count, 1, 8, 8) for _ in range(2)]})


@pytest.mark.parametrize(
    ("method", "options", "data", "message"),
    [
        (
            SupervisedMinority,
            MINORITY,
            counted(7, 0, 7),
            r"supervised_minority needs a rarer class, and 'a' and 'c' of data\.labels=\[class\] have 7 images each; "
            "set method.name to supervised_prototypes or supcon",
        ),
        (
            SupervisedMinority,
            MINORITY,
            counted(3, 4, 5),
            r"learns from two classes, and data\.labels=\[class\] has images of 3: a, b, c; set method\.name to supcon",
        ),
        (SupervisedMinority, MINORITY, counted(0, 9), r"has images of 1: b; .*another data\.labels"),
        (SupervisedMinority, MINORITY, counted(0, 0), "no image of the training split has a known label 'class'"),
        (SupervisedPrototypes, PROTOTYPES, counted(3, 4, 5), r"supervised_prototypes learns from two classes.* supcon"),
        (SupervisedPrototypes, PROTOTYPES, counted(9, 0), r"has images of 1: a"),
        (SupervisedPrototypes, PROTOTYPES, counted(*[2] * 8), r"has images of 8: a, b, c, d, e and 3 more; "),
        (
            SupervisedPrototypes,
            PROTOTYPES,
            TrainingSet(9, {"class": ("a", "b"), "side": ("l", "r")}, {"class": (4, 5), "side": (4, 5)}),
            r"one label kind and data\.labels names 2",
        ),
    ],
)
def test_data_without_a_rarer_of_two_classes_is_refused(method, options, data, message):
    with pytest.raises(UserError, match=message):
        method.check(options, data, global_batch=8)


def test_two_classes_are_taken_whatever_else_the_vocabulary_names():
    SupervisedMinority.check(MINORITY, UNEQUAL, global_batch=8)
    SupervisedPrototypes.check(PROTOTYPES, UNEQUAL, global_batch=8)
    SupervisedPrototypes.check(PROTOTYPES, counted(0, 6, 6), global_batch=8)


@pytest.mark.parametrize(
    ("counts", "minority", "majority"), [((5, 9), 0, 1), ((9, 5), 1, 0), ((0, 3, 0, 2), 3, 1), ((0, 4, 4), 2, 1)]
)
def test_the_rarer_class_that_has_images_is_the_minority(counts, minority, majority):
    method = SupervisedPrototypes(PROTOTYPES, Flat(), counted(*counts))
    assert (method.minority, method.majority) == (minority, majority)
    assert SupervisedMinority(MINORITY, Flat(), counted(*counts)).minority == minority


def test_supervised_minority_pulls_the_minority_alone():
    torch.manual_seed(0)
    method = SupervisedMinority(SupervisedMinorityOptions(temperature=0.3, projector=(5,)), Flat(), UNEQUAL)
    outputs = outputs_of(method)
    z, labels = outputs["z"].transpose(0, 1), [0, 0, 2, 2]
    expected = supervised_minority(z, torch.tensor(labels), minority=2, temperature=0.3)
    torch.testing.assert_close(method.loss(outputs, batch(labels), START), expected)
    of_the_majority = supervised_minority(z, torch.tensor(labels), minority=0, temperature=0.3)
    assert not torch.isclose(expected, of_the_majority)


def test_supervised_prototypes_pulls_by_its_buffer_and_threshold():
    torch.manual_seed(0)
    options = SupervisedPrototypesOptions(temperature=0.3, threshold=0.9, projector=(5,))
    method = SupervisedPrototypes(options, Flat(), UNEQUAL)
    method.survey(torch.randn(20, 5), {})
    outputs, labels = outputs_of(method), [0, 0, 2, -1]
    z = outputs["z"].transpose(0, 1)
    found = method.loss(outputs, batch(labels), START)
    expected = [
        supervised_prototypes(z, torch.tensor(labels), method.prototypes, temperature=0.3, threshold=at)
        for at in (0.9, -1)
    ]
    torch.testing.assert_close(found, expected[0])
    assert not torch.isclose(*expected)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SupCon, SupConOptions),
        (SupervisedMinority, SupervisedMinorityOptions),
        (SupervisedPrototypes, SupervisedPrototypesOptions),
    ],
)
def test_the_hybrid_adds_nt_xent_of_the_same_embeddings(method, options):
    losses = []
    for weight in (0.0, 0.4):
        torch.manual_seed(0)
        built = method(options(projector=(5,), instance_weight=weight, instance_temperature=0.5), Flat(), UNEQUAL)
        outputs = outputs_of(built)
        losses.append(built.loss(outputs, batch([0, 2, 2, -1]), START))
    apart = nt_xent(outputs["z"].transpose(0, 1), temperature=0.5)
    torch.testing.assert_close(losses[1] - losses[0], 0.4 * apart)


def mean_distance(point, x):
    """What the paper minimises, of a point on the sphere and the directions of vectors."""
    return sum(math.dist(point.tolist(), row.tolist()) for row in F.normalize(x.double(), dim=1)) / len(x)


def lowest_on_the_circle(x, angles=7200):
    candidates = [2 * math.pi * turn / angles for turn in range(angles)]
    points = [torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) for angle in candidates]
    return min(mean_distance(point, x) for point in points)


def lowest_on_the_sphere(x, side=60):
    """Over a grid of latitudes and longitudes, and the directions themselves, where the distance has a kink."""
    points = list(F.normalize(x.double(), dim=1))
    for i in range(side):
        for j in range(2 * side):
            latitude, longitude = math.pi * (i + 0.5) / side, math.pi * j / side
            ring = math.sin(latitude)
            point = [ring * math.cos(longitude), ring * math.sin(longitude), math.cos(latitude)]
            points.append(torch.tensor(point, dtype=torch.float64))
    return min(mean_distance(point, x) for point in points)


def test_the_median_of_a_circle_is_where_most_directions_are_and_not_their_mean():
    angles = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.3, 1.4, 1.6])
    x = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    found = spherical_median(x)
    assert found.dtype == torch.float64
    assert mean_distance(found, x) <= lowest_on_the_circle(x) + 1e-5
    torch.testing.assert_close(found, F.normalize(x[0].double(), dim=0), atol=1e-5, rtol=0)
    assert mean_distance(F.normalize(x.double().mean(dim=0), dim=0), x) > mean_distance(found, x) + 0.05


@given(seed=st.integers(0, 10**6), count=st.integers(3, 8))
@settings(deadline=None, max_examples=8)
def test_no_point_of_a_grid_is_nearer_to_all_directions_than_the_median(seed, count):
    """With a common direction, as embeddings of an untrained network have one: other minima are rare then."""
    torch.manual_seed(seed)
    x = torch.randn(count, 3) + torch.tensor([0.0, 0.0, 2.0])
    assert mean_distance(spherical_median(x), x) <= lowest_on_the_sphere(x) + 1e-5


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_the_median_is_stationary_and_never_worse_than_the_mean(seed):
    torch.manual_seed(seed)
    x = torch.randn(40, 6) + torch.randn(6)
    found, directions = spherical_median(x), F.normalize(x.double(), dim=1)
    assert found.norm().item() == pytest.approx(1)
    assert mean_distance(found, x) <= mean_distance(F.normalize(directions.mean(dim=0), dim=0), x) + 1e-9
    point = found.clone().requires_grad_()
    (slope,) = torch.autograd.grad((F.normalize(point, dim=0) - directions).norm(dim=1).mean(), point)
    assert slope.norm() < 1e-6


@pytest.mark.parametrize(
    "x",
    [torch.ones(5, 3), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.eye(3)],
    ids=["all alike", "no mean", "a vector of zeros", "a mean that is far from all"],
)
def test_degenerate_embeddings_still_have_a_median_of_length_one(x):
    found = spherical_median(x)
    assert found.norm().item() == pytest.approx(1)
    assert torch.equal(found, spherical_median(x))


def placed():
    torch.manual_seed(0)
    method = SupervisedPrototypes(SupervisedPrototypesOptions(projector=(5,)), Flat(), UNEQUAL)
    embeddings = torch.randn(20, 5) + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    return method, embeddings


def test_prototypes_are_opposite_and_the_majoritys_is_near_the_images_of_both_classes():
    method, embeddings = placed()
    assert not method.prototypes.any()
    labels = torch.tensor([0] * 15 + [2] * 5)
    method.survey(embeddings, {"class": labels})
    torch.testing.assert_close(method.prototypes[0].double(), spherical_median(embeddings), atol=1e-6, rtol=0)
    assert torch.equal(method.prototypes[2], -method.prototypes[0])
    assert not method.prototypes[1].any()
    before = method.prototypes.clone()
    method.survey(embeddings, {"class": labels.flip(0)})
    assert torch.equal(method.prototypes, before)  # by all images alike, whatever the labels say


def test_prototypes_are_placed_before_the_first_step_alone():
    method, _ = placed()
    assert [method.wants_survey(Progress(step, 10, 0.0)) for step in range(4)] == [True, False, False, False]


def test_prototypes_travel_in_the_state_dict():
    method, embeddings = placed()
    method.survey(embeddings, {})
    other = SupervisedPrototypes(SupervisedPrototypesOptions(projector=(5,)), Flat(), UNEQUAL)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert torch.equal(other.prototypes, method.prototypes)
    assert other.prototypes.any()


def test_without_a_projector_prototypes_are_as_wide_as_the_features():
    assert SupervisedPrototypes(SupervisedPrototypesOptions(projector=()), Flat(), UNEQUAL).prototypes.shape == (3, 6)
