"""Embeddings of several views of each image, laid out as the anchors and keys of the contrastive core."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ViewPairs:
    """V views of N images of this process among V views of the M images of the global batch.

    Anchors and keys are views one after another: key v * M + m is view v of image m.

    Args:
        z_VND: this process's embeddings.
        keys_VMD: those of the global batch; z_VND itself if left out.
        first: where this process's images begin among the M.

    Raises:
        ValueError: fewer than two views.
    """

    z_VND: Tensor
    keys_VMD: Tensor
    first: int

    @classmethod
    def of(cls, z_VND: Tensor, keys_VMD: Tensor | None = None, first: int = 0) -> ViewPairs:
        keys = z_VND if keys_VMD is None else keys_VMD
        if keys.shape[0] < 2:
            raise ValueError("a contrast between views needs at least two views of each image")
        return cls(z_VND, keys, first)

    @property
    def views(self) -> int:
        return self.keys_VMD.shape[0]

    @property
    def images(self) -> int:
        """M, of the global batch."""
        return self.keys_VMD.shape[1]

    @cached_property
    def anchors_AD(self) -> Tensor:
        """(V * N, D)."""
        return self.z_VND.flatten(0, 1)

    @cached_property
    def keys_KD(self) -> Tensor:
        """(V * M, D); the anchors themselves where a process has the whole batch."""
        return self.anchors_AD if self.keys_VMD is self.z_VND else self.keys_VMD.flatten(0, 1)

    @cached_property
    def own_A(self) -> Tensor:
        """Where each anchor stands among the keys."""
        places_VM = torch.arange(self.views * self.images, device=self.z_VND.device).view(self.views, self.images)
        return places_VM[:, self.first : self.first + self.z_VND.shape[1]].flatten()

    @cached_property
    def image_A(self) -> Tensor:
        """Which image of the global batch each anchor shows."""
        return self.own_A % self.images

    @cached_property
    def image_K(self) -> Tensor:
        """Which image each key shows."""
        return torch.arange(self.images, device=self.z_VND.device).repeat(self.views)

    @cached_property
    def other_views_AP(self) -> Tensor:
        """The keys that show the same image in the V - 1 other views, (V * N, V - 1)."""
        turns = torch.arange(1, self.views, device=self.z_VND.device)
        return (self.own_A[:, None] + turns * self.images) % (self.views * self.images)
