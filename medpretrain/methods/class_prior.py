"""The classes of a label that have images, and how frequent each is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.methods.base import MethodOptions, TrainingSet


class ClassPrior(nn.Module):
    """Numbers the classes that have images without gaps: a vocabulary may name others, whose frequency is 0.

    Args:
        counts: images of each class of the vocabulary.

    Attributes:
        log_prior: (C,), the logarithm of the frequency of each class that has images.

    >>> prior = ClassPrior((3, 0, 1))
    >>> prior(torch.tensor([2, 0, -1])).tolist(), prior.log_prior.exp().tolist()
    ([1, 0, -1], [0.75, 0.25])
    """

    log_prior: Tensor
    _number: Tensor

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__()
        images = torch.tensor(counts)
        there = images > 0
        number = torch.where(there, there.cumsum(dim=0) - 1, -1)
        # Both follow from the training set, which a checkpoint keeps. Label -1 finds the last number.
        self.register_buffer("_number", torch.cat([number, torch.tensor([-1])]), persistent=False)
        self.register_buffer("log_prior", (images[there] / images.sum()).log(), persistent=False)

    def __len__(self) -> int:
        return len(self.log_prior)

    def forward(self, labels: Tensor) -> Tensor:
        """Label ids of the vocabulary as numbers below C; -1 where unknown."""
        numbers: Tensor = self._number[labels]
        return numbers


def refuse_a_single_class(options: MethodOptions, data: TrainingSet) -> int:
    """How many classes have images.

    Raises:
        UserError: fewer than two.
    """
    there = sum(count > 0 for count in data.counts[data.label])
    if there < 2:
        raise UserError(
            f"{options.name} balances classes and only {there} of label {data.label!r} has images in the training "
            "split; give another data.labels or data.path"
        )
    return there
