"""Embeddings of earlier batches, as further keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK_ELEMENTS = 1 << 22
"""Similarities held at once in a search."""


class Queue(nn.Module):
    """The last Q embeddings, first in, first out; the same on every rank, and in the state dict.

    It starts with random directions (He et al. 2020) of label -1, which are negatives until real ones take their place.

    Args:
        size: Q.
        width: D.
        seed: of the random directions.

    Attributes:
        embeddings: (Q, D), of length 1.
        labels: (Q,) int64, -1 where unknown.
        next: () int64, where the next embedding goes.
    """

    embeddings: Tensor
    labels: Tensor
    next: Tensor

    def __init__(self, size: int, width: int, *, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("embeddings", F.normalize(torch.randn(size, width, generator=draw), dim=1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def push(self, keys_BD: Tensor, labels_B: Tensor | None = None) -> None:
        """Replace the oldest B embeddings; on every rank with those of the global batch.

        Args:
            keys_BD: any scale, B <= Q.
            labels_B: their labels; None: unknown.
        """
        count = len(keys_BD)
        assert count <= len(self)
        place = (self.next + torch.arange(count, device=self.next.device)) % len(self)
        self.embeddings[place] = F.normalize(keys_BD.to(self.embeddings.dtype), dim=1)
        self.labels[place] = -1 if labels_B is None else labels_B
        self.next += count
        self.next %= len(self)

    @torch.no_grad()
    def nearest(self, queries_AD: Tensor) -> Tensor:
        """The embedding of highest cosine to each query, (A, D); of equal ones the first, and no A x Q tensor at once.

        >>> queue = Queue(2, 2)
        >>> queue.push(torch.eye(2))
        >>> queue.nearest(torch.tensor([[0.1, 3.0]]))
        tensor([[0., 1.]])
        """
        # A query's length changes no order.
        blocks = queries_AD.to(self.embeddings.dtype).split(max(1, _BLOCK_ELEMENTS // len(self)))
        place = torch.cat([(block @ self.embeddings.T).argmax(dim=1) for block in blocks])
        return self.embeddings[place]
