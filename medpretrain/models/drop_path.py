"""Stochastic depth whose draws belong to images, so that they are the same on any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.data.counter import purpose, uniform

_DROP_PATH = purpose("drop path")


class KeyedDropPath(DropPath):
    """timm's DropPath with given draws: `kept` (rows,) is 0 where the path is dropped, and 1 / (1 - rate) elsewhere."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...), a row an image of a view.

        Raises:
            UserError: the backbone drops paths of something else than images.
        """
        if not self.training or self.kept is None:
            return x
        if len(self.kept) != len(x):
            raise UserError("this backbone does not drop the paths of whole images; leave backbone.drop_path at 0")
        return x * self.kept.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPaths:
    """The draws of all layers of a backbone that drop paths (Huang et al. 2016), by image, view, layer and step.

    Args:
        backbone: called with (views * n, C, S, S), views one after another; its layers are replaced.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._layers: list[KeyedDropPath] = []
        for path, layer in list(backbone.named_modules()):
            if type(layer) is DropPath and layer.drop_prob:
                keyed = KeyedDropPath(layer.drop_prob, layer.scale_by_keep)
                backbone.set_submodule(path, keyed.train(layer.training))
                self._layers.append(keyed)
        self._place = (0, 0, 0, 1)
        self._calls = 0
        if self._layers:
            backbone.register_forward_pre_hook(self._draw)

    def begin(self, seed: int, step: int, first: int, images: int) -> None:
        """The next calls are of a pass over `images` images of the global batch of a step, from its `first` on."""
        self._place, self._calls = (seed, step, first, images), 0

    def _draw(self, backbone: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not backbone.training:
            return
        rows: Tensor = arguments[0]
        seed, step, first, images = self._place
        assert len(rows) % images == 0
        layer, view, image = np.ogrid[: len(self._layers), : len(rows) // images, first : first + images]
        keep = 1 - np.array([one.drop_prob for one in self._layers])[:, None]
        drawn = uniform(seed, _DROP_PATH, step, self._calls, layer, view, image).reshape(len(self._layers), -1)
        scale = np.array([one.scale_by_keep for one in self._layers])[:, None]
        kept = (drawn < keep) / np.where(scale, keep, 1.0)
        for one, its in zip(self._layers, torch.from_numpy(kept.astype(np.float32)).to(rows.device), strict=True):
            one.kept = its
        self._calls += 1
