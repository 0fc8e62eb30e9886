"""The smallest backbone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Flat(nn.Module):
    """A linear layer on four gray values of an image."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(F.adaptive_avg_pool2d(images, 2).flatten(1))
        return features
