"""Whether one method is better than another: paired tests between evaluations that differ in their source alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError, nearest
from medpretrain.evaluation.intervals import (
    RESAMPLES,
    by_repeat,
    of_units,
    percentile_interval,
    require_same_images,
    resampled,
)
from medpretrain.evaluation.metrics import SCALARS
from medpretrain.evaluation.results import Evaluation, Interval, Predictions, Unit

ALPHA = 0.05

# Differences closer than this are equal: what is left of sums in another order.
_DECIMALS = 12
# Repeats whose every metric agrees to this many places are one result that was written down twice.
_COPY_DECIMALS = 6


class Comparison(BaseModel):
    """Two sources at one fraction, in one metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    fraction: float
    """Percent of the training patients."""
    first: str
    second: str
    """Names of the sources."""
    difference: float
    """Mean of first minus mean of second; better is above 0, but below for Brier and ECE."""
    interval: Interval | None
    """95 %, of the difference, over the patients tested on; None where no resamples were asked for."""
    pairs: int
    """Repeats or seeds that the test is of, each the mean over its folds."""
    copies: int
    """Repeats left out of the pairs because both sources gave the same result as in an earlier one."""
    statistic: float
    """Of Wilcoxon: the smaller of the sums of positive and negative ranks."""
    p: float
    """Two-sided, exact, of this comparison alone."""
    p_holm: float
    """Corrected by Holm for the comparisons of this metric at this fraction."""
    family: int
    """How many those are."""
    least_p: float
    """The smallest p so many pairs can give, 2 / 2^pairs."""
    least_p_holm: float
    """The smallest corrected p: `family` times that."""
    significant: bool
    """`p_holm` is 0.05 or below; never where `least_p_holm` is above."""


def compare(
    evaluated: Sequence[tuple[Evaluation, Predictions]],
    *,
    metrics: Sequence[str] = ("auroc",),
    reference: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Each pair of sources, or each source against one, at each fraction.

    The test is that of ModAn-MulSupCon, section 4.2: the folds of a repeat (or a seed) are averaged to one value, and
    the two sources' values of the same repeat are a pair of Wilcoxon's signed-rank test, two-sided; see `signed_rank`.
    It asks whether training again would give the same order on these patients. The interval asks the other question,
    whether other patients would: both sources are resampled by the same patients (`intervals.bootstrap_difference`).

    Three repeats cannot give a p below 0.25, whatever they show: `least_p` says so beside each p. Repeats that gave
    exactly the same are no repeats (kNN has no chance in it) and count once.

    Args:
        evaluated: one a source; the first of a pair comes earlier here, or is the reference.
        metrics: some of `SCALARS`.
        reference: the name of a source to compare the others with; each with each if left out.
        resamples: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap.

    Returns:
        By metric, then fraction, then in the order of the sources.

    Raises:
        UserError: fewer than two sources, or two of a name; evaluations that differ in more than their source; an
            unknown metric or reference; as `intervals.bootstrap`.
    """
    names = [evaluation.source.name for evaluation, _ in evaluated]
    _refuse(names, metrics, reference)
    for evaluation, _ in evaluated[1:]:
        require_comparable(evaluated[0][0], evaluation)
    pairs = list(combinations(range(len(names)), 2))
    if reference is not None:
        chosen = names.index(reference)
        pairs = [(chosen, other) for other in range(len(names)) if other != chosen]
    found: list[Comparison] = []
    for fraction in sorted({unit.fraction for unit in evaluated[0][0].units}):
        units = [[unit for unit in evaluation.units if unit.fraction == fraction] for evaluation, _ in evaluated]
        parts = [of_units(predictions, of) for (_, predictions), of in zip(evaluated, units, strict=True)]
        for part in parts[1:]:
            require_same_images(parts[0], part)
        drawn = [
            resampled(part, evaluation.data.classes, of, resamples=resamples, seed=seed) if resamples else None
            for (evaluation, _), part, of in zip(evaluated, parts, units, strict=True)
        ]
        for metric in metrics:
            tests = [_paired(units[a], units[b], metric) for a, b in pairs]
            corrected = holm([test.p for test in tests])
            for (a, b), test, p_holm in zip(pairs, tests, corrected, strict=True):
                of_a, of_b = drawn[a], drawn[b]
                interval = None if of_a is None or of_b is None else percentile_interval(of_a[metric] - of_b[metric])
                least = least_p(test.pairs)
                found.append(
                    Comparison(
                        metric=metric,
                        fraction=fraction,
                        first=names[a],
                        second=names[b],
                        difference=test.difference,
                        interval=interval,
                        pairs=test.pairs,
                        copies=test.copies,
                        statistic=test.statistic,
                        p=test.p,
                        p_holm=p_holm,
                        family=len(pairs),
                        least_p=least,
                        least_p_holm=min(1.0, len(pairs) * least),
                        significant=p_holm <= ALPHA,
                    )
                )
    return sorted(found, key=lambda comparison: list(metrics).index(comparison.metric))


def signed_rank(difference_n: NDArray[np.floating]) -> tuple[float, float]:
    """Wilcoxon's signed-rank test, two-sided and exact: the smaller sum of ranks, and p.

    Differences of 0 are dropped, as Wilcoxon did (`zero_method="wilcox"` of scipy); equal sizes share their mean rank.
    The distribution is that of all 2^n signs of the ranks at hand, also with ties and for any n: the normal
    approximation that scipy takes there can give less than 2 / 2^n. Without ties the same as
    `scipy.stats.wilcoxon(method="exact")`. No difference at all is p = 1.

    >>> signed_rank(np.array([0.1, 0.2, 0.3]))
    (0.0, 0.25)
    """
    difference_n = np.round(np.asarray(difference_n, np.float64), _DECIMALS)
    difference_n = difference_n[difference_n != 0]
    if not len(difference_n):
        return 0.0, 1.0
    _, size_n, equal = np.unique(np.abs(difference_n), return_inverse=True, return_counts=True)
    doubled_n = (2 * np.cumsum(equal) - equal + 1)[size_n]  # twice the mean rank, which can be a half
    above, total = int(doubled_n[difference_n > 0].sum()), int(doubled_n.sum())
    smaller = min(above, total - above)
    # Chance of each sum of the ranks with a plus, every sign being one or the other with a half.
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for rank in doubled_n:
        chance[rank:] += chance[:-rank].copy()
        chance /= 2
    return smaller / 2, min(1.0, 2 * float(chance[: smaller + 1].sum()))


def least_p(pairs: int) -> float:
    """The smallest two-sided p of `pairs` pairs: all signs alike, one way or the other.

    >>> [least_p(n) for n in (1, 3, 5, 6)]
    [1.0, 0.25, 0.0625, 0.03125]
    """
    return min(1.0, 2.0 / 2.0**pairs)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): the chance of one false claim in the family stays what p says.

    The i-th smallest of m is multiplied by m - i + 1, and is at least its predecessor and at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p)
    reached = 0.0
    for passed, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        reached = max(reached, min(1.0, (len(p) - passed) * p[place]))
        corrected[place] = reached
    return corrected


def require_comparable(first: Evaluation, second: Evaluation) -> None:
    """Refuse two evaluations that differ in more than their source.

    Raises:
        UserError: naming what differs.
    """
    one, other = first.source.name, second.source.name
    if first.comparable() != second.comparable():
        different = "; ".join(_differences(first, second)) or "their records"
        raise UserError(f"{one!r} and {other!r} cannot be compared, they differ in {different}")
    if _plan(first) != _plan(second):
        raise UserError(f"{one!r} and {other!r} cannot be compared, they differ in their units")


def _differences(first: Evaluation, second: Evaluation) -> list[str]:
    found = []
    for name in ("protocol", "variant", "parameters", "data", "folds", "repeats", "seeds"):
        one, other = getattr(first, name), getattr(second, name)
        if isinstance(one, BaseModel):
            one, other = one.model_dump(), other.model_dump()
        if isinstance(one, dict):
            keys = [key for key in {**one, **other} if one.get(key) != other.get(key) or (key in one) != (key in other)]
            found += [f"{name}.{key} ({one.get(key)!r} and {other.get(key)!r})" for key in keys]
        elif one != other:
            found.append(f"{name} ({one!r} and {other!r})")
    return found


def _plan(evaluation: Evaluation) -> list[tuple[float, int, int, int | None, int, int]]:
    return [(u.fraction, u.seed, u.repeat, u.fold, u.number, u.n_test) for u in evaluation.units]


class _Test(BaseModel):
    difference: float
    pairs: int
    copies: int
    statistic: float
    p: float


def _paired(first: list[Unit], second: list[Unit], metric: str) -> _Test:
    one, other = ({key: _means(run) for key, run in by_repeat(units).items()} for units in (first, second))
    distinct: dict[tuple[float, ...], float] = {}
    differences = []
    for key in one:
        differences.append(one[key][metric] - other[key][metric])
        values = tuple(round(part[name], _COPY_DECIMALS) for part in (one[key], other[key]) for name in SCALARS)
        distinct.setdefault(values, differences[-1])
    statistic, p = signed_rank(np.array(list(distinct.values())))
    return _Test(
        difference=float(np.mean(differences)),
        pairs=len(distinct),
        copies=len(differences) - len(distinct),
        statistic=statistic,
        p=p,
    )


def _means(units: list[Unit]) -> dict[str, float]:
    return {name: float(np.mean([getattr(unit.metrics, name) for unit in units])) for name in SCALARS}


def _refuse(names: list[str], metrics: Sequence[str], reference: str | None) -> None:
    if len(names) < 2:
        raise UserError(f"a comparison needs at least two sources; there are {len(names)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two sources have the name {twice[0]!r}: the table could not tell them apart; name one anew")
    for metric in metrics:
        if metric not in SCALARS:
            raise UserError(f"there is no metric {metric!r}{nearest(metric, SCALARS)}")
    if reference is not None and reference not in names:
        raise UserError(f"there is no source {reference!r} to compare with{nearest(reference, names)}")
