"""Pretrainings that differ in nothing but their seed are one method: their evaluations taken together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from medpretrain.evaluation.intervals import summarise
from medpretrain.evaluation.results import SEED, SETTING, Evaluation, Predictions, Unit

Evaluated = tuple[Evaluation, Predictions]


def pooled(evaluated: Iterable[Evaluated]) -> list[Evaluated]:
    """The same evaluations, those of runs that differ only in the seed as one, in the order of their first.

    A run becomes a repeat, so means are over pretrainings, deviations between them, and the pairs of a comparison are
    seeds. Runs are in the order of their seeds; what has only some of the seeds cannot be paired with what has others,
    and `comparable` says so.

    Args:
        evaluated: of any sources, protocols and data.
    """
    together: dict[tuple[str, ...], list[Evaluated]] = {}
    for number, (evaluation, predictions) in enumerate(evaluated):
        setting = evaluation.source.about.get(SETTING)
        key = (str(setting), evaluation.source.kind) if setting else (str(number),)
        together.setdefault((*key, evaluation.comparable()), []).append((evaluation, predictions))
    return [_pool(group) if len(group) > 1 else group[0] for group in together.values()]


def _pool(group: Sequence[Evaluated]) -> Evaluated:
    group = sorted(group, key=lambda one: int(one[0].source.about[SEED] or 0))
    first = group[0][0]
    units: list[Unit] = []
    predicted = []
    for number, (evaluation, predictions) in enumerate(group):
        shift = len(units)
        units += [
            unit.model_copy(update={"number": unit.number + shift, "repeat": unit.repeat + number * evaluation.repeats})
            for unit in evaluation.units
        ]
        predicted.append(
            Predictions(
                predictions.unit_R + np.int32(shift),
                predictions.row_R,
                predictions.patient_R,
                predictions.label_R,
                predictions.scores_RK,
            )
        )
    together = Predictions.joined(predicted)
    sources = [evaluation.source for evaluation, _ in group]
    about = {
        key: value for key, value in first.source.about.items() if all(one.about.get(key) == value for one in sources)
    }
    seeds = ", ".join(str(one.about[SEED]) for one in sources)
    source = first.source.model_copy(
        update={
            "name": _common_name([one.name for one in sources]),
            "sha256": hashlib.sha256("".join(one.sha256 for one in sources).encode()).hexdigest(),
            "about": {**about, "pretraining_seeds": seeds},
        }
    )
    pooled = first.model_copy(
        update={
            "source": source,
            "repeats": first.repeats * len(group),
            "units": units,
            "summaries": summarise(units, together, first.data.classes),
            "seconds": sum(evaluation.seconds for evaluation, _ in group),
        }
    )
    return pooled, together


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with alike: `weak` of `weak-0` and `weak-1`."""
    first, last = min(names), max(names)
    same = next((place for place, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))
    return first[:same].rstrip("-_. ") or names[0]
