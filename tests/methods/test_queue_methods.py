"""MoCo v3, NNCLR and ReSSL: what each computes, updates and keeps, against plain computations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.methods import method_class
from medpretrain.methods.base import Progress, TrainingSet
from medpretrain.methods.moco_v3 import MocoV3, MocoV3Options
from medpretrain.methods.nnclr import Nnclr, NnclrOptions
from medpretrain.methods.ressl import ReSsl, ReSslOptions
from medpretrain.models.backbones import create_backbone
from medpretrain.models.heads import projection_mlp
from medpretrain.recipe import Recipe
from medpretrain.training.build import build_method
from medpretrain.training.process import Process
from medpretrain.training.trainer import Trainer
from tests.methods.flat import Flat

DATA = TrainingSet(samples=40, seed=5)
N = 6
SMALL = {
    "moco_v3": {"projector": [7, 5], "predictor": [8, 5]},
    "nnclr": {"projector": [7, 5], "predictor": [8, 5], "queue": 17},
    "ressl": {"projector": [7, 5], "queue": 17},
}
NO_BATCHNORM = {
    "moco_v3": {"projector": [5], "predictor": [5], "projector_norm": False},
    "nnclr": {"projector": [5], "predictor": [5], "projector_norm": False, "queue": 17},
    "ressl": {"projector": [5], "queue": 17},
}
KINDS = {"moco_v3": ("crop", "crop"), "nnclr": ("crop", "crop"), "ressl": ("strong", "weak")}


def built(name, options=SMALL):
    torch.manual_seed(0)
    kind = method_class(name)
    method = kind(kind.options.model_validate({"name": name, **options[name]}, strict=False), Flat(), DATA).double()
    for parameter in getattr(method, "momentum_encoder", nn.Module()).parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return method.train()


def views(name, seed=1, n=N, copies=1):
    draw = torch.Generator().manual_seed(seed)
    found = {kind: [] for kind in KINDS[name]}
    for kind in KINDS[name] * copies:
        found[kind].append(torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=draw))
    return found


def batch(size=N, first=0, step=3, micro=()):
    return Batch(step, 0, size, first, list(micro), {}, torch.arange(size))


def progress(step=3, total=10):
    return Progress(step, total, 2.0)


def encode(encoder, images):
    return encoder["projector"](encoder["backbone"](images))


def plain_info_nce(queries, keys, temperature):
    """The positive of each query stands at its own place among the keys."""
    total = 0.0
    for i, query in enumerate(queries):
        s = torch.stack([F.cosine_similarity(query, key, dim=0) for key in keys]) / temperature
        total = total - (s[i] - torch.logsumexp(s, dim=0))
    return total / len(queries)


def assert_same_loss_and_gradients(method, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(found, learning, retain_graph=True)
    theirs = torch.autograd.grad(expected, learning)
    assert any(gradient.abs().sum() > 0 for gradient in ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def plain_moco_v3(method, crops):
    a, b = crops
    (q1, q2) = (method.predictor(encode(method.encoder, images)) for images in (a, b))
    (k1, k2) = (encode(method.momentum_encoder, images).detach() for images in (a, b))
    t = method.opt.temperature
    return 2 * t * plain_info_nce(q1, k2, t) + 2 * t * plain_info_nce(q2, k1, t)


def test_moco_v3_is_both_directions_of_info_nce_times_twice_the_temperature():
    method = built("moco_v3")
    method.opt = method.opt.model_copy(update={"temperature": 0.3})
    given = views("moco_v3")
    found = method.loss(method(given), batch(), progress())
    assert_same_loss_and_gradients(method, found, plain_moco_v3(method, given["crop"]))


def plain_nnclr(method, crops, queue):
    z1, z2 = (method.projector(method.backbone(images)) for images in crops)
    p1, p2 = method.predictor(z1), method.predictor(z2)

    def neighbours(z):
        return [max(queue, key=lambda key: F.cosine_similarity(one, key, dim=0).item()) for one in z]

    t = method.opt.temperature
    return (plain_info_nce(neighbours(z1), p2, t) + plain_info_nce(neighbours(z2), p1, t)) / 2


def test_nnclr_contrasts_the_nearest_neighbour_with_the_other_views_prediction():
    method, given = built("nnclr"), views("nnclr")
    found = method.loss(method(given), batch(), progress())
    assert_same_loss_and_gradients(method, found, plain_nnclr(method, given["crop"], method.queue.embeddings))


def test_nnclr_asks_for_neighbours_of_what_the_queue_holds_before_the_step():
    method, given = built("nnclr"), views("nnclr")
    outputs = method(given)
    method.after_update(outputs, batch(), progress())
    first, second = method.queue.nearest(outputs["z"][:, 0]), F.normalize(outputs["z"][:, 0], dim=1)
    torch.testing.assert_close(first, second)  # now each image of view 1 is its own nearest
    again = method.loss(outputs, batch(), progress())
    torch.testing.assert_close(again, plain_nnclr(method, given["crop"], method.queue.embeddings))


def plain_ressl(method, given, queue):
    total = 0.0
    t_s, t_t = method.opt.temperature, method.opt.teacher_temperature
    student = encode(method.encoder, given["strong"][0])
    teacher = encode(method.momentum_encoder, given["weak"][0]).detach()
    for s, t in zip(student, teacher, strict=True):
        p = torch.softmax(torch.stack([F.cosine_similarity(t, key, dim=0) for key in queue]) / t_t, dim=0)
        log_q = torch.log_softmax(torch.stack([F.cosine_similarity(s, key, dim=0) for key in queue]) / t_s, dim=0)
        total = total - (p * log_q).sum()
    return total / len(student)


def test_ressl_is_the_cross_entropy_of_strong_to_weak_relations_to_the_queue():
    method, given = built("ressl"), views("ressl")
    found = method.loss(method(given), batch(), progress())
    assert_same_loss_and_gradients(method, found, plain_ressl(method, given, method.queue.embeddings))


def test_ressl_averages_over_all_strong_and_weak_views():
    method, given = built("ressl", NO_BATCHNORM), views("ressl", copies=2)
    found = method.loss(method(given), batch(), progress())
    expected = [
        plain_ressl(method, {"strong": [strong], "weak": [weak]}, method.queue.embeddings)
        for strong in given["strong"]
        for weak in given["weak"]
    ]
    torch.testing.assert_close(found, sum(expected) / 4)


@pytest.mark.parametrize("name", SMALL)
def test_every_part_of_the_global_batch_has_its_share_of_the_loss(name, monkeypatch):
    """The gather of two ranks is played by the outputs of the whole batch; only anchors are a part."""
    method = built(name)
    whole = method(views(name))
    expected = method.loss(whole, batch(), progress())
    half = N // 2
    by_width = {tuple(value.shape[1:]): value for key, value in whole.items() if key in ("key", "prediction")}
    monkeypatch.setattr(f"medpretrain.methods.{name}.gather", lambda x: by_width[tuple(x.shape[1:])])
    parts = [
        method.loss({key: value[first : first + half] for key, value in whole.items()}, batch(first=first), progress())
        for first in (0, half)
    ]
    torch.testing.assert_close(sum(parts) / 2, expected)
    assert not torch.isclose(parts[0], parts[1])


@pytest.mark.parametrize(("name", "pushed"), [("nnclr", "z"), ("ressl", "key")])
def test_the_queue_takes_the_first_view_of_the_whole_batch_once_the_step_is_done(name, pushed):
    method = built(name)
    before = copy.deepcopy(method.queue.state_dict())
    outputs = method(views(name))
    method.loss(outputs, batch(), progress()).backward()
    assert all(torch.equal(value, before[key]) for key, value in method.queue.state_dict().items())
    for step in range(4):
        method.after_update(outputs, batch(), progress(step))
        assert method.queue.next == (step + 1) * N % 17
    method.queue.load_state_dict(before)
    method.after_update(outputs, batch(), progress())
    torch.testing.assert_close(method.queue.embeddings[:N], F.normalize(outputs[pushed][:, 0], dim=1))
    assert torch.equal(method.queue.embeddings[N:], before["embeddings"][N:])
    assert not method.queue.embeddings.requires_grad


@pytest.mark.parametrize(("name", "pushed"), [("nnclr", "z"), ("ressl", "key")])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_the_queue_is_the_same_whatever_the_number_of_ranks(name, pushed, parts, monkeypatch):
    whole, split = built(name, NO_BATCHNORM), built(name, NO_BATCHNORM)
    given = views(name)
    whole.after_update(whole(given), batch(), progress())
    n = N // parts
    mine = [{kind: [x[f : f + n] for x in group] for kind, group in given.items()} for f in range(0, N, n)]
    outputs = [split(one) for one in mine]
    together = torch.cat([one[pushed][:, 0] for one in outputs])
    monkeypatch.setattr(f"medpretrain.methods.{name}.gather", lambda x: together)
    split.after_update(outputs[0], batch(), progress())
    torch.testing.assert_close(split.queue.embeddings, whole.queue.embeddings, rtol=1e-12, atol=1e-14)
    assert split.queue.next == whole.queue.next == N


def recipe(name, options=SMALL, micro_batches=1, backbone="test_vit"):
    kinds = {kind: {"size": 16, "count": KINDS[name].count(kind)} for kind in KINDS[name]}
    return Recipe.model_validate(
        {
            "name": "queues",
            "data": {"channels": 1, "mean": [0.5], "std": [0.5]},
            "backbone": {"name": backbone},
            "views": kinds,
            "method": {"name": name, **options[name]},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {"steps": 10, "global_batch": N, "micro_batches": micro_batches},
        }
    )


ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def trainer(name, options=SMALL, method=None):
    return Trainer(method or built(name, options), recipe(name, options), ALONE, total=10, steps_per_epoch=3.0)


def train(one, name, steps, micro_batches=1):
    for step in steps:
        given, n = views(name, seed=step), N // micro_batches
        micro = [{kind: [x[f : f + n] for x in group] for kind, group in given.items()} for f in range(0, N, n)]
        one.step(batch(step=step, micro=micro))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_training_in_micro_batches_changes_neither_weights_nor_queue(name, micro_batches):
    whole, parts = trainer(name, NO_BATCHNORM), trainer(name, NO_BATCHNORM)
    train(whole, name, range(4))
    train(parts, name, range(4), micro_batches)
    for key, value in whole.method.state_dict().items():
        torch.testing.assert_close(parts.method.state_dict()[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_a_run_from_a_state_dict_continues_to_the_same_bits(name):
    through = trainer(name)
    train(through, name, range(4))
    kept = {part.name: part.values.clone() for part in through.parts()}
    train(through, name, range(4, 8))
    torch.manual_seed(77)
    kind = method_class(name)
    fresh = kind(kind.options.model_validate({"name": name, **SMALL[name]}), Flat(), TrainingSet(40, seed=9)).double()
    resumed = trainer(name, method=fresh)
    for part in resumed.parts():
        part.values.copy_(kept[part.name])
    resumed.loaded()
    train(resumed, name, range(4, 8))
    state = through.method.state_dict()
    assert state.keys() == resumed.method.state_dict().keys()
    assert all(torch.equal(value, resumed.method.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "step", "momentum"), [("moco_v3", 0, 0.99), ("moco_v3", 5, 0.995), ("ressl", 5, 0.999)]
)
def test_the_following_encoder_moves_by_its_momentum_and_is_not_trained(name, step, momentum):
    method = built(name)
    before = [parameter.clone() for parameter in method.momentum_encoder.parameters()]
    outputs = method(views(name))
    method.loss(outputs, batch(), progress()).backward()
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())
    method.after_update(outputs, batch(), progress(step))
    found = list(method.momentum_encoder.parameters())
    for old, new, leader in zip(before, found, method.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * leader)


def test_moco_v3s_momentum_ends_at_1():
    method = built("moco_v3")
    outputs = method(views("moco_v3"))
    before = copy.deepcopy(method.momentum_encoder.state_dict())
    method.after_update(outputs, batch(), progress(step=10))
    assert all(torch.equal(value, before[key]) for key, value in method.momentum_encoder.state_dict().items())


def vit(**options):
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", channels=1, image_size=16)
    return MocoV3(MocoV3Options(projector=(8, 8, 5), predictor=(8, 5), predictor_norm=True, **options), backbone, DATA)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_patch_embedding_has_no_gradient_and_no_place_in_the_optimizer(frozen):
    method = vit(freeze_patch_embed=frozen).double()
    patches = list(method.encoder["backbone"].patch_embed.parameters())
    before = [parameter.clone() for parameter in patches]
    one = trainer("moco_v3", method=method)
    stepped = {id(parameter) for group in one.optimizer.param_groups for parameter in group["params"]}
    crops = [torch.randn(N, 1, 16, 16, dtype=torch.float64) for _ in range(2)]
    with_gradient = set()
    one.optimizer.register_step_pre_hook(
        lambda *_: with_gradient.update(id(p) for p in method.parameters() if p.grad is not None)
    )
    one.step(batch(micro=[{"crop": crops}]))
    assert all((id(parameter) not in with_gradient) == frozen for parameter in patches)
    assert all((id(parameter) in stepped) != frozen for parameter in patches)
    assert all(torch.equal(a, b) == frozen for a, b in zip(before, patches, strict=True))
    rest = [p for name, p in method.encoder.named_parameters() if "patch_embed" not in name]
    assert rest
    assert all(id(parameter) in with_gradient and id(parameter) in stepped for parameter in rest)


def test_a_backbone_without_patches_cannot_freeze_them():
    with pytest.raises(UserError, match=r"method.freeze_patch_embed.*backbone.name"):
        MocoV3(MocoV3Options(freeze_patch_embed=True), Flat(), DATA)


def test_a_head_with_a_final_norm_gives_columns_of_mean_0_and_variance_1():
    torch.manual_seed(0)
    head = projection_mlp(6, (8, 5), final_norm=True)
    out = head(3 + torch.randn(400, 6))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(dim=0, correction=0), torch.ones(5), rtol=0, atol=1e-2)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 6), (8,), (8,), (5, 8)]


@pytest.mark.parametrize(
    ("options", "projector", "predictor"),
    [({}, True, False), ({"projector_norm": False, "predictor_norm": True}, False, True)],
)
def test_moco_v3s_heads_end_as_the_recipe_says(options, projector, predictor):
    method = MocoV3(MocoV3Options(projector=(8, 5), predictor=(8, 5), **options), Flat(), DATA)
    assert isinstance(method.encoder["projector"][-1], nn.BatchNorm1d) == projector
    assert isinstance(method.predictor[-1], nn.BatchNorm1d) == predictor


@pytest.mark.parametrize(("kind", "options"), [(Nnclr, NnclrOptions), (ReSsl, ReSslOptions)])
def test_a_queue_shorter_than_a_batch_is_refused(kind, options):
    kind.check(options(queue=N), DATA, N)
    with pytest.raises(UserError, match=r"method\.queue to at least 6"):
        kind.check(options(queue=N - 1), DATA, N)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("alike", [False, True], ids=["one image", "images all alike"])
def test_degenerate_batches_have_finite_losses_and_gradients(name, alike):
    method = built(name, NO_BATCHNORM).float()
    n = 4 if alike else 1
    given = {kind: [torch.ones(n, 1, 8, 8) for _ in group] for kind, group in views(name).items()}
    loss = method.loss(method(given), batch(n), progress())
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", SMALL)
def test_under_autocast_the_loss_and_the_queue_are_in_float32(name):
    method = built(name).float()
    given = {kind: [x.float() for x in group] for kind, group in views(name).items()}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = method(given)
    loss = method.loss(outputs, batch(), progress())
    assert loss.dtype == torch.float32
    method.after_update({key: value.detach() for key, value in outputs.items()}, batch(), progress())
    if hasattr(method, "queue"):
        assert method.queue.embeddings.dtype == torch.float32
        torch.testing.assert_close(method.queue.embeddings.norm(dim=1), torch.ones(17))


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_builds_it_and_exports_the_trained_backbone(name):
    method = build_method(recipe(name), DATA)
    assert set(method.exported.state_dict()) == set(method.trained.state_dict())
    assert all(parameter.requires_grad for parameter in method.exported.parameters())
