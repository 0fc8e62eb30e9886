"""Heads that sit on a backbone while it is pretrained and are thrown away afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projection_mlp(inputs: int, widths: Sequence[int], *, norm: bool = True, final_norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths, with BatchNorm and ReLU between them; the last one is bare.

    Args:
        norm: whether there is BatchNorm between them; without, they have a bias.
        final_norm: a BatchNorm without affine follows the last layer, which then needs no bias.

    >>> [tuple(p.shape) for p in projection_mlp(8, [6, 4]).parameters()]
    [(6, 8), (6,), (6,), (4, 6), (4,)]
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers.append(nn.Linear(inputs, width, bias=not norm))
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers.append(nn.ReLU(inplace=True))
        inputs = width
    layers.append(nn.Linear(inputs, widths[-1], bias=not final_norm))
    if final_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class DinoHead(nn.Module):
    """DINO's head: an MLP with GELU, L2 normalisation, then logits over prototypes (Caron et al. 2021, appendix C).

    The last layer is weight-normalised with its gain frozen at 1, which is a linear layer with unit rows.
    """

    def __init__(self, inputs: int, *, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65536) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)

    def forward(self, features_ND: Tensor) -> Tensor:
        """(N, D) -> (N, prototypes)."""
        return F.linear(F.normalize(self.mlp(features_ND), dim=-1), F.normalize(self.prototypes, dim=-1))
