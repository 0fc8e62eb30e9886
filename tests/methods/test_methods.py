"""What each method computes and updates, against the papers' definitions in plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.data.order import counterparts
from medpretrain.losses.instance import nt_xent
from medpretrain.methods import METHODS, method_class
from medpretrain.methods.amimv import Amimv, AmimvOptions
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.dino import Dino, DinoOptions
from medpretrain.methods.modan_mulsupcon import ModAnMulSupCon, MulSupConOptions
from medpretrain.models.ema import follow
from medpretrain.models.heads import DinoHead
from tests.methods.flat import Flat

NO_LABELS = TrainingSet(samples=20)
ONE_LABEL = TrainingSet(20, {"class": ("a", "b")}, {"class": (5, 15)})
LABELLED = TrainingSet(
    20, {"modality": ("CT", "MR"), "anatomy": ("lung", "hand", "head")}, {"modality": (8, 10), "anatomy": (2, 3, 4)}
)


def images(count, size=8):
    return torch.randn(count, 1, size, size)


def batch(size, labels=None, step=3):
    return Batch(step=step, seed=0, size=size, first=0, micro=[], labels=labels or {}, samples=torch.arange(size))


def progress(step=3, total=10, epoch=2.0):
    return Progress(step, total, epoch)


@pytest.fixture
def dino():
    torch.manual_seed(0)
    return Dino(DinoOptions(prototypes=12, hidden=8, bottleneck=5, teacher_momentum=0.9), Flat(), NO_LABELS)


def dino_views(n=5):
    torch.manual_seed(1)
    return {"global": [images(n), images(n)], "local": [images(n, 4) for _ in range(3)]}


def test_dino_gives_the_student_all_views_and_the_teacher_the_global_ones(dino):
    views = dino_views()
    outputs = dino(views)
    assert outputs["student"].shape == (5, 5, 12)
    assert outputs["teacher"].shape == (5, 2, 12)
    for number, view in enumerate([*views["global"], *views["local"]]):
        torch.testing.assert_close(outputs["student"][:, number], dino.student_head(dino.student(view)))
    assert outputs["student"].requires_grad
    assert not outputs["teacher"].requires_grad


def test_the_teacher_and_the_center_follow_by_their_momentum(dino):
    for parameter in dino.student.parameters():
        parameter.data += 1
    before = copy.deepcopy(dino.teacher.state_dict())
    outputs = dino(dino_views())
    dino.after_update(outputs, batch(5), progress(step=0))
    for name, value in dino.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * dino.student.state_dict()[name])
    torch.testing.assert_close(dino.center, 0.1 * outputs["teacher"].mean(dim=(0, 1)))
    dino.after_update(outputs, batch(5), progress(step=10))  # the momentum has risen to 1
    frozen = copy.deepcopy(dino.teacher.state_dict())
    dino.after_update(outputs, batch(5), progress(step=10))
    assert all(torch.equal(value, frozen[name]) for name, value in dino.teacher.state_dict().items())


def test_the_last_layer_stands_still_in_the_first_epoch_only(dino):
    for epoch, frozen in ((0.9, True), (1.0, False)):
        assert dino.frozen(progress(epoch=epoch)) == frozen
    assert [dino.get_parameter(name) is dino.student_head.prototypes for name in dino.freezable] == [True]


def test_the_teachers_temperature_warms_up():
    options = DinoOptions(warmup_teacher_temperature=0.04, teacher_temperature=0.07, teacher_warmup=0.5, prototypes=4)
    method = Dino(options, Flat(), NO_LABELS)
    found = [method.teacher_temperature(Progress(step, 11, 0.0)) for step in (0, 2, 5, 10)]
    assert found == pytest.approx([0.04, 0.052, 0.07, 0.07])


def test_the_head_ends_in_a_layer_of_unit_rows():
    head = DinoHead(6, hidden=8, bottleneck=5, prototypes=7)
    features = torch.randn(3, 6)
    expected = F.normalize(head.mlp(features), dim=1) @ (head.prototypes / head.prototypes.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(features), expected)
    assert head(features).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["dino", "moco_v3"])
def test_an_encoder_that_follows_drops_no_path_in_training_mode(name):
    from medpretrain.models.backbones import create_backbone

    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", channels=1, image_size=32, drop_path=0.9)
    chosen = method_class(name)
    method = chosen(chosen.options(), backbone, NO_LABELS).train()
    trained, follows = (
        (method.student, method.teacher)
        if name == "dino"
        else (method.encoder["backbone"], method.momentum_encoder["backbone"])
    )
    x = images(4, 32)
    assert torch.equal(follows(x), follows(x))
    assert not torch.equal(trained(x), trained(x))


@pytest.mark.parametrize("fusion", ["mean", "product", "concat"])
def test_amimv_is_nt_xent_between_fused_embeddings_of_two_images(fusion):
    torch.manual_seed(0)
    method = Amimv(AmimvOptions(fusion=fusion, projector=(5,), temperature=0.3), Flat(), NO_LABELS).double()
    for parameter in method.momentum_encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    n = 4
    views = {"normalised": [images(n).double()], "augmented": [images(n).double()]}

    def encode(encoder, x):
        return F.normalize(encoder["projector"](encoder["backbone"](x)), dim=1)

    def fuse(a, b):
        return {"mean": (a + b) / 2, "product": a * b, "concat": torch.cat([a, b])}[fusion]

    q_norm, q_aug = (encode(method.encoder, views[name][0]) for name in ("normalised", "augmented"))
    k_norm, k_aug = (encode(method.momentum_encoder, views[name][0]).detach() for name in ("normalised", "augmented"))
    partner = counterparts(0, 3, n)
    z = [fuse(q_norm[i], q_aug[partner[i]]) for i in range(n)] + [fuse(k_aug[i], k_norm[partner[i]]) for i in range(n)]
    expected = 0.0
    for i in range(2 * n):
        s = torch.stack([F.cosine_similarity(z[i], z[k], dim=0) / 0.3 for k in range(2 * n) if k != i])
        positive = F.cosine_similarity(z[i], z[(i + n) % (2 * n)], dim=0) / 0.3
        expected = expected - (positive - torch.logsumexp(s, dim=0)) / (2 * n)
    torch.testing.assert_close(method.loss(method(views), batch(n), progress()), expected)


def test_amimvs_momentum_encoder_follows_and_gets_no_gradient():
    method = Amimv(AmimvOptions(momentum=0.5, projector=(4, 3)), Flat(), NO_LABELS).train()
    views = {"normalised": [images(6)], "augmented": [images(6)]}
    outputs = method(views)
    method.loss(outputs, batch(6), progress()).backward()
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    before = method.momentum_encoder["backbone"].layer.weight.clone()
    method.encoder["backbone"].layer.weight.data += 1
    method.after_update(outputs, batch(5), progress())
    torch.testing.assert_close(method.momentum_encoder["backbone"].layer.weight, before + 0.5)


def test_mul_sup_con_pulls_by_modality_and_anatomy():
    torch.manual_seed(0)
    method = ModAnMulSupCon(MulSupConOptions(), Flat(), LABELLED)
    views = {"crop": [images(4), images(4)]}
    same = {"modality": torch.tensor([0, 0, 1, 1]), "anatomy": torch.tensor([0, 0, 2, -1])}
    other = {"modality": torch.tensor([0, 1, 0, 1]), "anatomy": torch.tensor([0, 0, 2, -1])}
    outputs = method(views)
    first, second = (method.loss(outputs, batch(4, labels), progress()) for labels in (same, other))
    assert not torch.isclose(first, second)
    assert outputs["z"].shape == (4, 2, 6)
    torch.testing.assert_close(outputs["z"][:, 1], method.backbone(views["crop"][1]))


def test_images_without_any_label_are_pulled_to_their_own_views_alone():
    torch.manual_seed(0)
    method = ModAnMulSupCon(MulSupConOptions(), Flat(), LABELLED)
    outputs = method({"crop": [images(4), images(4)]})
    z = outputs["z"].transpose(0, 1)
    unknown = torch.tensor([-1, -1, -1, -1])
    found = method.loss(outputs, batch(4, {"modality": unknown, "anatomy": unknown}), progress())
    torch.testing.assert_close(found, nt_xent(z, temperature=0.07))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_views_options_and_exported_backbone(name):
    method = method_class(name)
    assert method.view_kinds
    assert method.options.model_fields["name"].default == name
    backbone = Flat()
    built = method(method.options(), backbone, ONE_LABEL)
    assert set(built.exported.state_dict()) == set(backbone.state_dict())


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'dino'"):
        method_class("dinov")


def test_following_with_momentum_zero_copies_and_one_stays():
    teacher, student = Flat(), Flat()
    kept = copy.deepcopy(teacher.state_dict())
    follow(teacher, student, 1.0)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    follow(teacher, student, 0.0)
    assert torch.equal(teacher.layer.weight, student.layer.weight)
