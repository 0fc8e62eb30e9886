from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from data_prep.errors import UserError
from medpretrain.models.backbones import as_plain_timm_state, create_backbone
from medpretrain.models.preprocessing import Preprocessing


def settled(backbone: nn.Module, channels: int, size: int) -> nn.Module:
    """Batch statistics that are not the initial 0 and 1, so that a wrong buffer would show."""
    torch.manual_seed(5)
    backbone.train()
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(4, channels, size, size))
    return backbone.eval()


def test_the_output_is_features_of_the_announced_width() -> None:
    backbone = create_backbone("resnet18", channels=2)
    assert backbone(torch.zeros(2, 2, 32, 32)).shape == (2, backbone.num_features)


def test_the_3x3_stem_changes_one_convolution_and_keeps_the_pooling() -> None:
    plain, small = create_backbone("resnet18", channels=1), create_backbone("resnet18", channels=1, stem="3x3")
    assert small.conv1.weight.shape == (64, 1, 3, 3)
    assert small.conv1.stride == (1, 1)
    assert small.conv1.padding == (1, 1)
    assert small.conv1.bias is None
    assert repr(small.maxpool) == repr(plain.maxpool)
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_the_3x3_stem_starts_as_timm_starts_a_convolution() -> None:
    torch.manual_seed(0)
    weight = create_backbone("resnet50", channels=3, stem="3x3").conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("channels", "tolerance"), [(1, 0.0), (3, 1e-5)])
def test_plain_timm_on_the_enlarged_image_is_the_same_function(channels: int, tolerance: float) -> None:
    torch.manual_seed(3)
    backbone = settled(create_backbone("resnet18", channels=channels, stem="3x3"), channels, 33)
    plain = timm.create_model("resnet18", in_chans=channels, num_classes=0).eval()
    plain.load_state_dict(as_plain_timm_state(backbone.state_dict(), "3x3"))
    image = torch.randn(3, channels, 33, 47)
    with torch.inference_mode():
        enlarged = nn.functional.interpolate(image, scale_factor=2, mode="nearest")
        difference = (backbone(image) - plain(enlarged)).abs().max().item()
    assert difference <= tolerance


def test_the_state_of_a_3x3_stem_is_left_as_it_is() -> None:
    state = create_backbone("resnet18", channels=1, stem="3x3").state_dict()
    as_plain_timm_state(state, "3x3")
    assert state["conv1.weight"].shape == (64, 1, 3, 3)


def test_a_vision_transformer_takes_crops_smaller_than_it_was_built_for() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", channels=1, image_size=64)
    assert backbone.pos_embed.shape[1] == 1 + 16
    assert backbone(torch.zeros(1, 1, 64, 64)).shape == backbone(torch.zeros(1, 1, 32, 32)).shape == (1, 192)


def test_drop_path_grows_with_depth() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", channels=1, image_size=32, drop_path=0.1)
    assert backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet81"}, "did you mean 'resnet18'"),
        ({"name": "resnet18.a1_in2k"}, "did you mean 'resnet18.a1_in1k'"),
        ({"name": "vit_tiny_patch16_224", "stem": "3x3"}, "vit_tiny_patch16_224 has none"),
        ({"name": "resnet18d", "stem": "3x3"}, "resnet18d has none"),
        ({"name": "vit_tiny_patch16_224", "image_size": 65}, "should be 64 or 80"),
        ({"name": "vit_tiny_patch16_224", "image_size": 9}, "should be 16$"),
        ({"name": "resnet18", "channels": 0}, "at least one channel"),
        ({"name": "resnet18", "drop_path": 1.0}, "rate from 0"),
        ({"name": "vgg11", "drop_path": 0.1}, "vgg11 has no stochastic depth"),
        ({"name": "resnet18", "pretrained": True}, "could not be fetched"),
    ],
)
def test_what_cannot_be_built_is_refused(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(UserError, match=message):
        create_backbone(**{"channels": 1, **options})  # type: ignore[arg-type]


def test_weights_that_do_not_exist_are_refused() -> None:
    name = sorted(set(timm.list_models()) - {full.split(".")[0] for full in timm.list_pretrained()})[0]
    with pytest.raises(UserError, match="has no ImageNet weights"):
        create_backbone(name, channels=3, pretrained=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.5, 0.5)},
        {"std": (0.0,)},
        {"std": (float("nan"),)},
        {"size": 0},
        {"bit_depth": 17},
    ],
)
def test_preprocessing_that_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    good = {"size": 64, "channels": 1, "mean": (0.5,), "std": (0.2,)}
    with pytest.raises(UserError):
        Preprocessing(**{**good, **wrong})  # type: ignore[arg-type]
