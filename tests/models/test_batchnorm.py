import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from data_prep.errors import UserError
from medpretrain.models.batchnorm import GlobalBatchNorm, GlobalBatchNormAct, use_global_batchnorm


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def models():
    yield nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (5, 2, 8, 8)
    yield nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False, momentum=None)), (5, 6)
    yield nn.Sequential(nn.Conv2d(2, 4, 3), BatchNormAct2d(4)), (5, 2, 8, 8)
    yield nn.BatchNorm1d(3, track_running_stats=False), (5, 3, 7)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("case", range(4))
def test_a_world_of_one_is_plain_batch_norm(case):
    torch.manual_seed(0)
    model, shape = list(models())[case]
    converted = use_global_batchnorm(copy.deepcopy(model))
    for train in (True, True, False):
        x = torch.randn(shape)
        torch.testing.assert_close(converted.train(train)(x), model.train(train)(x), rtol=0, atol=0)
    assert converted.state_dict().keys() == model.state_dict().keys()
    for ours, theirs in zip(converted.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_timm_backbones_keep_names_tensors_and_eval_output(name):
    model = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    before, expected = model.state_dict(keep_vars=True), model(x)
    converted = use_global_batchnorm(model)
    assert converted is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert torch.equal(model(x), expected)
    left = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, BatchNormAct2d))]
    assert not left
    kind = GlobalBatchNormAct if name == "efficientnet_b0" else GlobalBatchNorm
    assert any(type(m) is kind for m in model.modules())


def test_a_layer_used_twice_stays_one_layer():
    norm = nn.BatchNorm1d(3)
    model = use_global_batchnorm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}))
    assert model["a"] is model["b"][0]


def test_a_second_conversion_changes_nothing():
    model = use_global_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    layer = model[0]
    assert use_global_batchnorm(model)[0] is layer


def test_for_cuda_the_layers_are_torchs_and_timms():
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNormAct2d(3))
    use_global_batchnorm(model, device="cuda")
    assert [type(layer).__name__ for layer in model] == ["SyncBatchNorm", "SyncBatchNormAct"]


def test_a_batch_norm_of_another_class_is_refused_by_name():
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match=r"1 is a Odd"):
        use_global_batchnorm(nn.Sequential(nn.ReLU(), Odd(3)))
