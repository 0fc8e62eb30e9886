"""Self-distillation: the student's distribution over prototypes against the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def dino_loss(
    student_SNK: Tensor,
    teacher_TNK: Tensor,
    center_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """DINO's cross-entropy over all pairs of a teacher view and another student view, averaged over N images.

    Equation 3 of Caron et al. 2021, in float32 at least. The first T student views are those the teacher saw too.

    Args:
        student_SNK: logits of all S views, global ones first.
        teacher_TNK: logits of the T global views; no gradient reaches them.
        center_K: subtracted from the teacher's logits.

    Raises:
        ValueError: no pair of different views.

    >>> dino_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(4),
    ...           student_temperature=0.1, teacher_temperature=0.04).item()  # log 4: both uniform
    1.3862...
    """
    views, given = len(student_SNK), len(teacher_TNK)
    pairs = given * views - given
    if pairs == 0:
        raise ValueError("DINO needs at least two views of each image")
    if student_SNK.dtype != torch.float64:
        student_SNK, teacher_TNK = student_SNK.float(), teacher_TNK.float()
    target_TNK = torch.softmax((teacher_TNK.detach() - center_K) / teacher_temperature, dim=-1)
    log_p_SNK = torch.log_softmax(student_SNK / student_temperature, dim=-1)
    # The sum over pairs is the product of the sums, less the pairs of a view with itself.
    every = (target_TNK.sum(dim=0) * log_p_SNK.sum(dim=0)).sum(dim=-1)
    same = (target_TNK * log_p_SNK[:given]).sum(dim=-1).sum(dim=0)
    return -(every - same).mean() / pairs
