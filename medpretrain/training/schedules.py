"""Learning rate, teacher momentum and weight decay as pure functions of the step.

A step may be a fraction, and nothing is remembered between calls: a resumed run continues on the same curve.
"""

from __future__ import annotations

import math

from data_prep.errors import UserError


def cosine(step: float, *, total: float, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total`; `end` from there on.

    end + (start - end) * (1 + cos(pi * step / total)) / 2, as for DINO's teacher momentum (0.996 -> 1) and weight
    decay (0.04 -> 0.4), Caron et al. 2021.

    Args:
        step: steps done, >= 0.
        total: length of the curve in steps, > 0.
        start: value at step 0.
        end: value at step `total`.

    Raises:
        UserError: a negative step or a length that is not positive.

    >>> cosine(0, total=100, start=0.996, end=1.0)
    0.996
    >>> round(cosine(50, total=100, start=0.996, end=1.0), 6)
    0.998
    >>> cosine(120, total=100, start=0.04, end=0.4)
    0.4
    """
    if not total > 0:
        raise UserError(f"a schedule needs a length of more than 0 steps, not {total}")
    if not step >= 0:
        raise UserError(f"a schedule has no value at step {step}")
    if step >= total:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def warmup_cosine(step: float, *, total: float, warmup: float, base: float, final: float, start: float = 0.0) -> float:
    """A straight line from `start` to `base` over `warmup` steps, then half a cosine to `final` at step `total`.

    Loshchilov & Hutter 2017 (one period) after the linear warm-up of Goyal et al. 2017.

    Args:
        step: steps done, >= 0.
        total: length in steps with the warm-up, > 0.
        warmup: length of the warm-up in steps, from 0 to `total`.
        base: the highest value, reached when the warm-up ends.
        final: value from step `total` on.
        start: value at step 0, when there is a warm-up.

    Raises:
        UserError: a negative step, a length that is not positive, or a warm-up outside 0 to `total`.

    >>> [round(warmup_cosine(s, total=10, warmup=4, base=1.0, final=0.0), 3) for s in (0, 2, 4, 7, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> warmup_cosine(0, total=10, warmup=0, base=1.0, final=0.0)
    1.0
    """
    if not 0 <= warmup <= total:
        raise UserError(f"a warm-up of {warmup} steps does not fit into a schedule of {total} steps")
    if 0 <= step < warmup:
        return start + (base - start) * step / warmup
    if warmup == total and total > 0 and step >= total:
        return final
    return cosine(step - warmup if step >= 0 else step, total=total - warmup, start=base, end=final)
