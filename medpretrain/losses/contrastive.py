"""One core for every contrastive loss: `-sum_p w_ap log softmax`, a block of anchors at a time.

Each objective is its rule for the pairs: which keys an anchor is pulled to, and which stand in its denominator. Anchors
may be the part of a global batch that this process holds, and keys all of it, a queue, prototypes, or any mix; how they
came together is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22
"""Logits of a block: 16 MB in float32. Larger ones leave the cache of a CPU; smaller ones make too many launches."""


@dataclass(frozen=True)
class Pairs:
    """What an objective says of R anchors and all K keys.

    Attributes:
        weight: w_ap >= 0, (R, K), divided by whatever the objective divides by; or (R, P) with `key`.
        key: (R, P), the places among the keys that the weights belong to; None: all of them, in order.
        log_share: added to the logits in the denominator alone, of any shape that broadcasts to (R, K): minus infinity
            leaves a key out, -log n takes the mean of n keys. None: all keys count alike.
    """

    weight: Tensor
    key: Tensor | None = None
    log_share: Tensor | None = None


Rule = Callable[[slice], Pairs]
"""From a run of anchors to their pairs; called once for each block, so that no A x K tensor exists."""


def contrastive_loss(
    anchors_AD: Tensor,
    keys: Tensor | Sequence[Tensor],
    rule: Rule,
    *,
    temperature: float | Tensor,
    own_A: Tensor | None = None,
    logits_AC: Tensor | None = None,
) -> Tensor:
    """The mean over anchors of L_a = -sum_p w_ap [ s_ap / T - log sum_{k in D(a)} exp(s_ak / T) ].

    Equation 2 (L_out) of Khosla et al. 2020 with general weights and denominators; s is the cosine. The gradient is
    written by hand and made in the forward pass, where a block's logits are still at hand, so nothing of size A x K is
    kept or computed twice; it is only scaled later. There is no second derivative.

    Args:
        anchors_AD, keys: embeddings of any scale, normalised here, in float32 or wider also under autocast. Several
            tensors of keys (batch, queue, prototypes) stand one after another; only those that learn cost a gradient.
        rule: what it gives a pair of an anchor with itself is ignored.
        temperature: T > 0; one, or (A,) of one for each anchor.
        own_A: where each anchor stands among the keys; that key is left out. None: no key is the anchor itself.
        logits_AC: further keys behind the others, of which the logits are given (class logits); not divided by T.

    Returns:
        A scalar. An anchor whose weights are all 0 adds 0.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    parts = [keys] if isinstance(keys, Tensor) else list(keys)
    with torch.autocast(anchors_AD.device.type, enabled=False):
        units_AD = unit(anchors_AD)
        units = [units_AD if part is anchors_AD else unit(part) for part in parts]
        # The temperature divides the anchors: A x D divisions instead of A x K.
        scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
        loss: Tensor = _Contrast.apply(rule, own_A, logits_AC, units_AD / scale, *units)
    return loss


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 or wider; a row of zeros stays one."""
    return F.normalize(at_least_float32(x), dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, own_A: Tensor | None, logits_AC: Tensor | None, anchors_AD: Tensor, *parts: Tensor
    ) -> Tensor:
        keys = parts[0] if len(parts) == 1 else torch.cat(parts)
        anchors_n, keys_n = len(anchors_AD), len(keys)
        needed = ctx.needs_input_grad
        extra = 0 if logits_AC is None else logits_AC.shape[1]
        # Keys that learn (batch before queue, usually) are multiplied by themselves alone.
        spans = _spans([len(part) for part in parts])
        grad_anchors = torch.empty_like(anchors_AD) if needed[3] else None
        grad_parts = [torch.zeros_like(p) if need else None for p, need in zip(parts, needed[4:], strict=True)]
        grad_logits = torch.empty_like(logits_AC) if logits_AC is not None and needed[2] else None
        total = anchors_AD.new_zeros(())
        # All blocks share one piece of memory: fresh pages cost a CPU as much as the arithmetic on them.
        size = max(1, min(anchors_n, _BLOCK_ELEMENTS // max(1, keys_n + extra)))
        memory = anchors_AD.new_empty(size, keys_n + extra)
        for first in range(0, anchors_n, size):
            rows = slice(first, min(first + size, anchors_n))
            anchors, logits = anchors_AD[rows], memory[: rows.stop - first]
            torch.mm(anchors, keys.T, out=logits[:, :keys_n])
            if logits_AC is not None:
                logits[:, keys_n:] = logits_AC[rows]
            own = None if own_A is None else own_A[rows, None]
            loss, gradient = _block(logits, rule(rows), own)
            total += loss
            if grad_anchors is not None:
                torch.mm(gradient[:, :keys_n], keys, out=grad_anchors[rows])
            for grad, span in zip(grad_parts, spans, strict=True):
                if grad is not None:
                    grad.addmm_(gradient[:, span].T, anchors)
            if grad_logits is not None:
                grad_logits[rows] = gradient[:, keys_n:]
        grads = (grad_logits, grad_anchors, *grad_parts)
        ctx.kept = [grad is not None for grad in grads]
        ctx.anchors = anchors_n
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        return total / anchors_n

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0] / ctx.anchors
        saved = iter(ctx.saved_tensors)
        return (None, None, *(next(saved) * scale if kept else None for kept in ctx.kept))


def _block(logits_RK: Tensor, pairs: Pairs, own_R1: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of the anchors' losses, and its gradient to the logits in the memory of the logits."""
    weight = pairs.weight.to(logits_RK.dtype)
    if own_R1 is not None:
        weight = weight.scatter(1, own_R1, 0) if pairs.key is None else weight.masked_fill(pairs.key == own_R1, 0)
    chosen = logits_RK if pairs.key is None else logits_RK.gather(1, pairs.key)
    attraction = (weight * chosen).sum()
    total_R1 = weight.sum(dim=1, keepdim=True)
    if pairs.log_share is not None:
        logits_RK.add_(pairs.log_share)
    if own_R1 is not None:
        logits_RK.scatter_(1, own_R1, -torch.inf)
    # logsumexp by hand: its exponentials are the gradient's too. The highest is 1, so a sum below it is that of an
    # empty denominator, which counts as 1 and repels nothing.
    highest_R1 = logits_RK.amax(dim=1, keepdim=True)
    highest_R1.masked_fill_(highest_R1 == -torch.inf, 0)
    sum_R1 = logits_RK.sub_(highest_R1).exp_().sum(dim=1, keepdim=True).clamp_(min=1)
    loss = (total_R1 * (sum_R1.log() + highest_R1)).sum() - attraction
    gradient = logits_RK.mul_(total_R1 / sum_R1)
    if pairs.key is None:
        gradient.sub_(weight)
    else:
        row = torch.arange(len(gradient), device=gradient.device)[:, None].expand_as(pairs.key)
        gradient.index_put_((row, pairs.key), -weight, accumulate=True)
    return loss, gradient


def _spans(lengths: Sequence[int]) -> list[slice]:
    spans, first = [], 0
    for length in lengths:
        spans.append(slice(first, first + length))
        first += length
    return spans
