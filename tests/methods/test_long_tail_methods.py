"""BCL, PaCo and SBC: what they compute, what they keep, when they look again, and what they refuse."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.losses.balanced import balanced_contrastive, parametric_contrastive, subclass_contrastive
from medpretrain.losses.supervised import sup_con
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.bcl import Bcl, BclOptions
from medpretrain.methods.paco import Paco, PacoOptions
from medpretrain.methods.sbc import Sbc, SbcOptions
from medpretrain.methods.subclasses import balanced_subclasses
from tests.methods.flat import Flat

COUNTS = (30, 0, 5, 65)  # the vocabulary names a class that has no image
DATA = TrainingSet(104, {"class": ("a", "b", "c", "d")}, {"class": COUNTS})
LABELS = torch.tensor([0, 2, 3, 3, -1, 3])
NUMBERS = torch.tensor([0, 1, 2, 2, -1, 2])
BUILT = {
    "bcl": lambda data=DATA: Bcl(BclOptions(projector=(5, 4)), Flat(), data),
    "paco": lambda data=DATA: Paco(PacoOptions(projector=(5, 4), queue=16, momentum=0.5), Flat(), data),
    "sbc": lambda data=DATA: Sbc(SbcOptions(projector=(5, 4), warmup_epochs=0), Flat(), data),
}


def images(count):
    return torch.randn(count, 1, 8, 8, dtype=torch.float64)


def batch(labels=LABELS, step=3):
    size = len(labels)
    return Batch(step, seed=0, size=size, first=0, micro=[], labels={"class": labels}, samples=torch.arange(size))


def built(name, **data):
    torch.manual_seed(0)
    method = BUILT[name](replace(DATA, **data)).double()
    views = {"crop": [images(6), images(6)]}
    return method, method(views), views


NOW = Progress(3, 100, 0.5)


def test_bcl_adds_the_adjusted_cross_entropy_to_the_balanced_contrast():
    method, outputs, views = built("bcl")
    features = torch.stack([method.backbone(crop) for crop in views["crop"]])
    prior = torch.tensor([0.3, 0.05, 0.65], dtype=torch.float64).log()
    logits = (method.classifier(features) + prior)[:, NUMBERS >= 0].flatten(0, 1)
    classification = F.cross_entropy(logits, NUMBERS[NUMBERS >= 0].repeat(2))
    prototypes = method.prototypes(method.classifier.weight)
    contrast = balanced_contrastive(outputs["z"].transpose(0, 1), NUMBERS, prototypes, temperature=0.07)
    found = method.loss(outputs, batch(), NOW)
    torch.testing.assert_close(found, classification + 0.35 * contrast)
    found.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters() if parameter.ndim > 1)


def test_paco_contrasts_with_labelled_keys_and_centres():
    method, outputs, views = built("paco")
    method.queue.push(torch.randn(9, 4), torch.tensor([0, 1, 2] * 3))
    features = method.encoder["backbone"](views["crop"][0])
    with torch.no_grad():
        key = method.momentum_encoder["projector"](method.momentum_encoder["backbone"](views["crop"][1]))
    expected = parametric_contrastive(
        method.encoder["projector"](features),
        [key, method.queue.embeddings],
        method.centres(features) + torch.tensor([0.3, 0.05, 0.65], dtype=torch.float64).log(),
        NUMBERS,
        torch.cat([NUMBERS, torch.tensor([0, 1, 2] * 3 + [-1] * 7)]),
        torch.arange(6),
        temperature=0.2,
    )
    # A method is made in float32: prior and queue are rounded.
    torch.testing.assert_close(method.loss(outputs, batch(), NOW), expected, rtol=1e-6, atol=1e-7)


def test_pacos_queue_takes_the_keys_and_their_labels():
    method, outputs, _ = built("paco")
    method.after_update(outputs, batch(), NOW)
    torch.testing.assert_close(method.queue.embeddings[:6], F.normalize(outputs["key"][:, 0], dim=1))
    assert method.queue.labels.tolist() == [*NUMBERS.tolist(), *[-1] * 10]
    assert method.queue.next == 6


def test_sbc_is_sup_con_until_it_knows_sub_classes_and_then_uses_those_of_the_samples():
    method, outputs, _ = built("sbc")
    z = outputs["z"].transpose(0, 1)
    torch.testing.assert_close(method.loss(outputs, batch(), NOW), sup_con(z, LABELS, temperature=0.1))
    labels = torch.cat([LABELS, torch.tensor([0] * 29 + [2] * 4 + [3] * 62 + [-1] * 3)])
    method.survey(torch.randn(len(labels), 4), {"class": labels})
    expected = subclass_contrastive(z, LABELS, method.subclasses[:6], temperature=0.1, class_weight=0.25)
    torch.testing.assert_close(method.loss(outputs, batch(), NOW), expected)


@pytest.mark.parametrize("name", BUILT)
def test_a_method_goes_on_from_its_state_dict(name):
    method, outputs, views = built(name)
    labels = torch.randint(-1, 1, (DATA.samples,))
    method.survey(torch.randn(DATA.samples, 4), {"class": torch.where(labels < 0, labels, 3)})
    for parameter in method.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    method.after_update(outputs, batch(), NOW)
    other = BUILT[name]().double()
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    losses = [one.loss(one(views), batch(), NOW) for one in (method, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", BUILT)
def test_batches_without_known_labels_have_finite_gradients(name):
    method, outputs, _ = built(name)
    loss = method.loss(outputs, batch(torch.full((6,), -1)), NOW)
    loss.backward()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained)


def test_every_class_is_split_into_sub_classes_as_large_as_the_smallest_class():
    torch.manual_seed(1)
    labels = torch.tensor([0] * 1003 + [1] * 25 + [3] * 260 + [-1] * 12)[torch.randperm(1300)]
    found = balanced_subclasses(torch.randn(1300, 8), labels, smallest=10, seed=0)
    assert (found[labels < 0] == -1).all()
    subclasses, sizes = found[labels >= 0].unique(return_counts=True)
    assert subclasses.tolist() == list(range(40 + 1 + 10))
    assert sizes.min() >= 25
    assert sizes.max() <= 26
    for subclass in subclasses:
        assert len(labels[found == subclass].unique()) == 1
    few = balanced_subclasses(torch.randn(1300, 8), labels, smallest=100, seed=0)
    assert few.max() + 1 == 10 + 1 + 3


def test_sub_classes_are_the_clusters_that_are_there_and_the_same_again():
    torch.manual_seed(2)
    cluster = torch.arange(4).repeat(50)
    x = torch.eye(4)[cluster] * torch.rand(200, 1).add(0.5) + 0.05 * torch.randn(200, 4)
    labels = torch.cat([torch.zeros(200, dtype=torch.int64), torch.ones(50, dtype=torch.int64)])
    x = torch.cat([x, -torch.ones(50, 4)])
    found = [balanced_subclasses(x, labels, smallest=10, seed=seed) for seed in (3, 3)]
    assert torch.equal(*found)
    assert len({tuple(pair) for pair in torch.stack([found[0][:200], cluster]).T.tolist()}) == 4


@pytest.mark.parametrize("x", [torch.ones(70, 3), torch.zeros(70, 3)])
def test_images_that_look_alike_are_split_all_the_same(x):
    labels = torch.tensor([0] * 69 + [1])
    sizes = torch.bincount(balanced_subclasses(x, labels, smallest=1, seed=0))
    assert sizes.tolist() == [1] * 70


def test_a_survey_without_known_labels_finds_nothing():
    assert (balanced_subclasses(torch.randn(4, 3), torch.full((4,), -1), smallest=1, seed=0) == -1).all()


@pytest.mark.parametrize("steps_per_epoch", [0.3, 1.0, 3.0, 7.3, 2.1328125, 36.78125, 1000 / 7])
@pytest.mark.parametrize(("warmup", "every"), [(0.0, 10.0), (10.0, 10.0), (5.0, 0.5), (2.5, 3.0)])
def test_sub_classes_are_looked_for_once_an_interval_and_at_its_first_step(steps_per_epoch, warmup, every):
    method = Sbc(SbcOptions(warmup_epochs=warmup, every_epochs=every, projector=(4,)), Flat(), DATA)
    total = round(60 * steps_per_epoch)
    wanted = [s for s in range(total) if method.wants_survey(Progress(s, total, s / steps_per_epoch))]
    boundaries = [warmup + number * every for number in range(int(60 / every) + 1)]
    first = {min((s for s in range(total) if s / steps_per_epoch >= b - 1e-9), default=None) for b in boundaries}
    assert wanted == sorted(first - {None})


@pytest.mark.parametrize(
    ("method", "options", "counts", "size", "message"),
    [
        (Bcl, BclOptions(), (5, 0, 0, 0), 12, "only 1 of label 'class' has images"),
        (Paco, PacoOptions(), (0, 0, 7, 0), 12, "only 1 of label 'class' has images"),
        (Sbc, SbcOptions(), (0, 0, 7, 0), 12, "only 1 of label 'class' has images"),
        (Bcl, BclOptions(), COUNTS, 2, "train.global_batch to at least 3"),
        (Paco, PacoOptions(queue=8), COUNTS, 12, "method.queue to at least 12"),
        (Sbc, SbcOptions(), (0, 0, 0, 0), 12, "no image of the training split has a known label 'class'"),
    ],
)
def test_what_cannot_be_balanced_is_refused(method, options, counts, size, message):
    with pytest.raises(UserError, match=message):
        method.check(options, replace(DATA, counts={"class": counts}), size)
    method.check(options.model_copy(update={"queue": 12}), DATA, 12)
