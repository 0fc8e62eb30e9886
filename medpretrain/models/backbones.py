"""The networks that are pretrained: timm models without a head, with a stem for small images."""

from __future__ import annotations

import math
from typing import Any, Literal

import timm
from timm.models import ResNet
from torch import Tensor, nn

from data_prep.errors import UserError, nearest

Stem = Literal["timm", "3x3"]

# timm's files whose models can interpolate their positional embeddings on the fly.
_DYNAMIC_SIZE = ("deit", "eva", "vision_transformer", "vision_transformer_hybrid", "vitamin")
_STEM_CONV = "conv1.weight"


def create_backbone(
    name: str,
    *,
    channels: int,
    stem: Stem = "timm",
    image_size: int | None = None,
    pretrained: bool = False,
    drop_path: float = 0.0,
) -> nn.Module:
    """A timm model that maps images (N, channels, S, S) to features (N, D), with D in `.num_features`.

    Args:
        name: a timm architecture, with or without a tag of its weights (`resnet18`, `resnet18.a1_in1k`).
        channels: channels of the images; ImageNet weights are adapted to them by timm.
        stem: "3x3" replaces a ResNet's 7x7 convolution of stride 2 by a 3x3 one of stride 1, as is usual for images
            of about 64 pixels. It starts from random numbers, with `pretrained` too.
        image_size: pixels; a model with positional embeddings is built for it. A Vision Transformer still takes other
            multiples of its patch, with its embeddings interpolated, as DINO's local crops need.
        pretrained: load timm's ImageNet weights.
        drop_path: rate of stochastic depth, >= 0 and < 1.

    Raises:
        UserError: an unknown name, a stem the architecture does not have, a size that does not fit its patches,
            weights that are not there.

    >>> import torch
    >>> create_backbone("resnet18", channels=1, stem="3x3")(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 512])
    """
    architecture = _known_architecture(name)
    if channels < 1:
        raise UserError(f"a backbone needs at least one channel, not {channels}")
    if not 0 <= drop_path < 1:
        raise UserError(f"drop_path is a rate from 0 to below 1, not {drop_path}")
    config = timm.get_pretrained_cfg(name)
    if pretrained and not (config and config.has_weights):
        raise UserError(f"timm has no ImageNet weights for {name!r}; start without pretrained")
    options = _size_options(architecture, image_size)
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        backbone: nn.Module = timm.create_model(
            name, pretrained=pretrained, in_chans=channels, num_classes=0, **options
        )
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise UserError(f"{architecture} has no stochastic depth; leave drop_path at 0") from error
        raise
    except OSError as error:  # the hub's errors and the sockets' are OSErrors
        raise UserError(
            f"the weights of {name!r} could not be fetched ({type(error).__name__}): "
            "they need a network, or a copy of them in the Hugging Face cache (HF_HOME)"
        ) from error
    _check_patches(backbone, architecture, image_size)
    if stem == "3x3":
        _use_3x3_stem(backbone, architecture)
    return backbone


def as_plain_timm_state(backbone_state: dict[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """The state dict that timm's own architecture needs to compute the same features.

    timm has no 3x3 stem of stride 1. But on an image enlarged twice by repeating its pixels, a 7x7 kernel of stride 2
    that is zero at its even taps reads exactly the pixels a 3x3 kernel of stride 1 reads on the image itself.
    So features(x) of a 3x3 stem equal plain timm's features of x enlarged twice ("nearest").

    Args:
        backbone_state: of a backbone from `create_backbone`; left as it is.
        stem: the stem it was created with.

    >>> import torch
    >>> as_plain_timm_state({"conv1.weight": torch.ones(64, 1, 3, 3)}, "3x3")["conv1.weight"].shape
    torch.Size([64, 1, 7, 7])
    """
    state = dict(backbone_state)
    if stem == "3x3":
        w_OC33 = state[_STEM_CONV]
        assert w_OC33.shape[2:] == (3, 3), f"not the state of a 3x3 stem: {tuple(w_OC33.shape)}"
        w_OC77 = w_OC33.new_zeros(*w_OC33.shape[:2], 7, 7)
        w_OC77[:, :, 1::2, 1::2] = w_OC33
        state[_STEM_CONV] = w_OC77
    return state


def _known_architecture(name: str) -> str:
    """The name without its tag."""
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        raise UserError(f"timm has no model {name!r}{nearest(architecture, known)}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise UserError(f"timm has no weights {name!r}{nearest(name, tagged)}")
    return architecture


def _size_options(architecture: str, image_size: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.fixed_input_size:
        return options
    if image_size is not None:
        options["img_size"] = image_size
    if timm.models.is_model_in_modules(architecture, _DYNAMIC_SIZE):
        options["dynamic_img_size"] = True
    return options


def _check_patches(backbone: nn.Module, architecture: str, image_size: int | None) -> None:
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if image_size is not None and patch is not None and any(image_size % side for side in patch):
        below, above = (rounding(image_size / patch[0]) * patch[0] for rounding in (math.floor, math.ceil))
        sizes = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{architecture} cuts patches of {patch[0]} pixels; image_size {image_size} should be {sizes}")


def _use_3x3_stem(backbone: nn.Module, architecture: str) -> None:
    conv = getattr(backbone, "conv1", None)
    if not isinstance(backbone, ResNet) or not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7):
        raise UserError(f"stem 3x3 replaces the 7x7 convolution of a ResNet; {architecture} has none")
    backbone.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
