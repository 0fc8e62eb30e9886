"""The supervised baseline's loss of a global batch, whatever part of it a rank has and whichever labels are unknown."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.classification import effective_number
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.supervised import Supervised, SupervisedOptions, class_weights
from tests.methods.flat import Flat

# No image is of the spleen.
DATA = TrainingSet(
    40,
    {"type": ("benign", "malignant"), "anatomy": ("lung", "spleen", "hand", "head")},
    {"type": (30, 6), "anatomy": (5, 0, 10, 20)},
)
LABELS = {
    "type": torch.tensor([0, 1, -1, 0, -1, -1, 1, 0]),
    "anatomy": torch.tensor([-1, 0, 2, 3, 3, -1, 3, 2]),
}
VARIANTS = [
    {"loss": loss, "weighting": weighting, "focusing": focusing}
    for loss in ("cross_entropy", "binary")
    for weighting, focusing in (("none", 0.0), ("inverse", 0.0), ("effective", 2.0))
]


def build(data=DATA, **options):
    torch.manual_seed(0)
    return Supervised(SupervisedOptions(**options), Flat(), data).double()


def crops(count, views=1):
    torch.manual_seed(1)
    return [torch.randn(count, 1, 8, 8, dtype=torch.float64) for _ in range(views)]


def loss_of_part(method, images, labels, first=0, count=None):
    size = len(images[0])
    count = count or size
    batch = Batch(3, 0, size, first, [], labels, torch.arange(size))
    return method.loss(method({"crop": [one[first : first + count] for one in images]}), batch, Progress(3, 10, 1.0))


def p_of(logits, kind):
    """The logits of one kind's classes among all."""
    start = {"type": 0, "anatomy": 2}[kind]
    return logits[start : start + len(DATA.classes[kind])]


def softmax_loss(method, images, labels, weights, gamma):
    """The mean over kinds of the weighted mean over images with a known label and over their views."""
    kinds = []
    for kind, ids in labels.items():
        total = weight = 0.0
        for view in images:
            logits = method({"crop": [view]})["logits"][:, 0]
            for row, label in zip(logits, ids.tolist(), strict=True):
                if label >= 0:
                    p = torch.softmax(p_of(row, kind), dim=0)[label]
                    total = total - weights[kind][label] * (1 - p) ** gamma * torch.log(p)
                    weight = weight + weights[kind][label]
        kinds.append(total / weight)
    return sum(kinds) / len(kinds)


def binary_loss(method, images, labels, weights, gamma):
    """The mean over all known bits of all kinds, images and views."""
    total, bits = 0.0, 0
    for view in images:
        logits = method({"crop": [view]})["logits"][:, 0]
        for kind, ids in labels.items():
            for row, label in zip(logits, ids.tolist(), strict=True):
                for number, x in enumerate(p_of(row, kind)):
                    if label >= 0:
                        on = number == label
                        p = torch.sigmoid(x if on else -x)
                        total = total - (weights[kind][number] if on else 1.0) * (1 - p) ** gamma * torch.log(p)
                        bits += 1
    return total / bits


WEIGHTS = {
    ("cross_entropy", "none"): {"type": [1, 1], "anatomy": [1, 1, 1, 1]},
    ("cross_entropy", "inverse"): {"type": [36 / 60, 36 / 12], "anatomy": [35 / 15, 0, 35 / 30, 35 / 60]},
    ("cross_entropy", "effective"): {kind: effective_number(counts, 0.9999) for kind, counts in DATA.counts.items()},
    ("binary", "none"): {"type": [1, 1], "anatomy": [1, 1, 1, 1]},
    ("binary", "inverse"): {"type": [6 / 30, 30 / 6], "anatomy": [30 / 5, 0, 25 / 10, 15 / 20]},
    ("binary", "effective"): {
        kind: [(1 - 0.9999 ** (sum(counts) - n)) / (1 - 0.9999**n) if n else 0 for n in counts]
        for kind, counts in DATA.counts.items()
    },
}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_is_the_mean_over_kinds_images_and_views_of_what_is_known(variant, views):
    method, images = build(**variant), crops(8, views)
    ours = loss_of_part(method, images, LABELS)
    reference = softmax_loss if variant["loss"] == "cross_entropy" else binary_loss
    weights = WEIGHTS[variant["loss"], variant["weighting"]]
    theirs = reference(method, images, LABELS, weights, variant["focusing"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # weights are kept in float32
    parameters = list(method.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_mean_over_ranks_is_the_loss_and_gradient_of_the_global_batch(variant, world):
    """Ranks know different numbers of labels: rank 2 of 4 knows no `type` at all."""
    method, images, local = build(**variant), crops(8, views=2), 8 // world
    parameters = list(method.parameters())
    whole = loss_of_part(method, images, LABELS)
    expected = torch.autograd.grad(whole, parameters)
    parts = [loss_of_part(method, images, LABELS, rank * local, local) for rank in range(world)]
    torch.testing.assert_close(sum(parts) / world, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(part, parameters) for part in parts]
    for name, of_ranks, of_whole in zip(parameters, zip(*gradients, strict=True), expected, strict=True):
        torch.testing.assert_close(
            sum(of_ranks) / world, of_whole, rtol=1e-10, atol=1e-13, msg=lambda text, at=name: f"{at.shape}: {text}"
        )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_without_any_known_label_the_loss_is_zero_and_so_is_every_gradient(variant):
    method = build(**variant)
    unknown = {kind: torch.full((8,), -1) for kind in LABELS}
    loss = loss_of_part(method, crops(8), unknown)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, list(method.parameters())):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_kind_by_inverse_frequency_is_torchs_weighted_cross_entropy():
    data = TrainingSet(36, {"type": ("a", "b")}, {"type": (30, 6)})
    method, images = build(data, weighting="inverse"), crops(8)
    logits = method({"crop": images})["logits"][:, 0]
    weight = torch.tensor([1 / 30, 1 / 6], dtype=torch.float64)
    expected = F.cross_entropy(logits, LABELS["type"], weight=weight, ignore_index=-1)
    torch.testing.assert_close(loss_of_part(method, images, {"type": LABELS["type"]}), expected, rtol=1e-6, atol=0)


def test_a_bit_that_all_images_have_keeps_a_weight():
    assert class_weights(SupervisedOptions(loss="binary", weighting="inverse"), (7, 0)) == [1.0, 0.0]


def test_heads_are_in_the_state_dict_and_not_in_the_export():
    method = build()
    state = method.state_dict()
    assert state["heads.0.weight"].shape == (2, 6)
    assert state["heads.1.weight"].shape == (4, 6)
    assert set(method.exported.state_dict()) == set(Flat().state_dict())
    assert build(weighting="inverse").state_dict().keys() == state.keys()  # the weights follow from the counts
    outputs = method({"crop": crops(5, views=3)})
    assert outputs["logits"].shape == (5, 3, 6)
    assert outputs["features"].shape == (5, 3, 6)
    assert not outputs["features"].requires_grad
    torch.testing.assert_close(outputs["features"][:, 2], method.backbone(crops(5, views=3)[2]))


def test_training_separates_two_classes():
    torch.manual_seed(3)
    method = build(TrainingSet(8, {"type": ("a", "b")}, {"type": (4, 4)}))
    labels = torch.tensor([0, 1] * 4)
    images = [crops(8)[0] + labels[:, None, None, None]]
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of_part(method, images, {"type": labels})
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"type": (9, 0), "anatomy": (1, 1, 0, 0)}, r"a label 'type' are 'benign', and supervised needs two classes"),
        ({"type": (9, 1), "anatomy": (0, 0, 0, 3)}, r"a label 'anatomy' are 'head'.*another data.labels"),
        ({"type": (0, 0), "anatomy": (1, 1, 0, 0)}, r"no image .* has a known label 'type'"),
    ],
)
def test_labels_with_fewer_than_two_classes_are_refused(loss, counts, message):
    with pytest.raises(UserError, match=message):
        Supervised.check(SupervisedOptions(loss=loss), TrainingSet(40, DATA.classes, counts), 8)


def test_two_classes_with_one_image_each_are_taken():
    Supervised.check(SupervisedOptions(), TrainingSet(2, {"type": ("a", "b", "c")}, {"type": (1, 0, 1)}), 2)


@pytest.mark.parametrize("option", [{"beta": 1.0}, {"focusing": -1.0}, {"weighting": "invers"}, {"loss": "mse"}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        SupervisedOptions(**option)
