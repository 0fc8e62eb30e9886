"""Whether the methods of one table differ, and how that is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import UserError
from medpretrain.evaluation import comparison as statistics
from medpretrain.evaluation.comparison import ALPHA, Comparison
from medpretrain.evaluation.intervals import RESAMPLES
from medpretrain.evaluation.results import Evaluation, Predictions
from medpretrain.report.gather import Group, Measured
from medpretrain.report.words import LOWER_IS_BETTER, METRIC_NAMES, count, p_value

TESTED = ("auroc", "aupr", "balanced_accuracy", "accuracy")
"""Metrics whose differences are tested; Holm's correction is over the pairs of one metric."""


@dataclass(frozen=True)
class Tests:
    """Every pair of methods in each of `TESTED`, at one fraction."""

    pairs: Sequence[Comparison] = ()
    why: str = ""
    """Why there are none."""
    without_intervals: str = ""
    """Why the differences have no intervals."""

    def of(self, metric: str) -> list[Comparison]:
        return [pair for pair in self.pairs if pair.metric == metric]

    def between(self, one: str, other: str, metric: str) -> Comparison | None:
        return next((pair for pair in self.of(metric) if {pair.first, pair.second} == {one, other}), None)

    def best(self, metric: str) -> str | None:
        """The method that is better than every other one with p of 0.05 or below after Holm's correction, if any."""
        names = dict.fromkeys(name for pair in self.of(metric) for name in (pair.first, pair.second))
        for name in names:
            own = [pair for pair in self.of(metric) if name in (pair.first, pair.second)]
            if all(pair.significant and better(pair) == name for pair in own):
                return name
        return None


def tested(group: Group, fraction: float) -> Tests:
    """All pairs of a group; without intervals where the patients are too few for them."""
    if len(group.measured) < 2:
        return Tests(why="There is one method only, so there is nothing to compare it with.")
    chosen = [_at(one, fraction) for one in group.measured]
    try:
        return Tests(statistics.compare(chosen, metrics=TESTED, resamples=RESAMPLES))
    except UserError as error:
        try:
            pairs = statistics.compare(chosen, metrics=TESTED, resamples=0)
        except UserError as other:
            return Tests(why=f"The methods were not tested against one another: {other}.")
        return Tests(pairs, without_intervals=f"The differences have no intervals: {error}.")


def _at(one: Measured, fraction: float) -> tuple[Evaluation, Predictions]:
    """The evaluation of one fraction, under the name by which the report calls its source."""
    units = [unit for unit in one.evaluation.units if unit.fraction == fraction]
    source = one.evaluation.source.model_copy(update={"name": one.method.name})
    return one.evaluation.model_copy(update={"units": units, "source": source}), one.predictions


def better(pair: Comparison) -> str:
    """Which of the two has the better mean."""
    first = pair.difference < 0 if pair.metric in LOWER_IS_BETTER else pair.difference > 0
    return pair.first if first else pair.second


def other_patients(pair: Comparison) -> str:
    """What the interval says."""
    if pair.interval is None:
        return "not known"
    apart = pair.interval.low > 0 or pair.interval.high < 0
    return f"{better(pair)} stays better" if apart else "could be otherwise"


def trained_again(pair: Comparison) -> str:
    """What the test says."""
    if pair.significant:
        return f"{better(pair)} stays better"
    return "too few repeats to tell" if pair.least_p_holm > ALPHA else "could be otherwise"


def notes(tests: Tests, metric: str) -> list[str]:
    """What is to be known of the table of one metric."""
    pairs = tests.of(metric)
    first = pairs[0]
    found = [
        "Difference: mean of the first minus mean of the second; below it the 95 % interval over patients (paired "
        "bootstrap), which asks whether other patients would show the same.",
        f"p: Wilcoxon's signed-rank test, two-sided and exact, of {count(first.pairs, 'pair')} of repeats or seeds, "
        "each the mean of its folds, which asks whether training again would show the same; Holm: corrected for the "
        f"{count(first.family, 'comparison')} of this table.",
        f"Least p: what so many pairs can give at best, before and after the correction. {_reach(first)}",
    ]
    copies = max(pair.copies for pair in pairs)
    if copies:
        found.append(f"{count(copies, 'repeat')} gave exactly the same as another one and counts once.")
    return [*found, *([tests.without_intervals] if tests.without_intervals else [])]


def _reach(pair: Comparison) -> str:
    if pair.least_p_holm <= ALPHA:
        return f"They are enough for a p of {ALPHA} in {METRIC_NAMES[pair.metric]}."
    needed = next(n for n in range(1, 60) if pair.family * statistics.least_p(n) <= ALPHA)
    return (
        f"Whatever the numbers are, {count(pair.pairs, 'pair')} cannot bring the corrected p below "
        f"{p_value(pair.least_p_holm)}; for {ALPHA} it takes {needed}."
    )
