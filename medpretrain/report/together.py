"""Runs that differ in nothing but their seed are one method, pretrained several times: their evaluations as one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medpretrain.evaluation.intervals import RESAMPLES, summarise
from medpretrain.evaluation.results import Predictions, SourceRecord, Unit
from medpretrain.report.gather import Group, Material, Measured, Method, Run, rank


@dataclass(frozen=True)
class Family:
    """Several pretrainings by one recipe.

    Attributes:
        name: as shown.
        runs: the pretrainings, by seed.
        members: the methods that were evaluated, one a run.
    """

    name: str
    runs: list[Run]
    members: list[Method]


def with_families(material: Material) -> Material:
    """The same, with a method and groups more for every recipe that was pretrained with several seeds."""
    found = families(material)
    groups = pretrained_together(material, found)
    shown = {one.method.name: one.method for group in groups for one in group.measured}
    members = {family.name: [method.name for method in family.members] for family in found if family.name in shown}
    gone_into = {name for names in members.values() for name in names}
    alone = [
        replace(group, in_short=any(one.method.name in gone_into for one in group.measured))
        for group in material.groups
    ]
    return replace(
        material,
        methods=[*shown.values(), *material.methods],
        groups=sorted([*groups, *alone], key=rank),
        families=members,
    )


def families(material: Material) -> list[Family]:
    """Runs whose recipes differ in name and seed alone, trained on the same data, each with another seed."""
    by_source = {method.source.sha256: method for method in material.methods}
    alike: dict[str, list[tuple[Run, Method]]] = {}
    for run in material.runs:
        own = [by_source[sha256] for sha256 in run.sources]
        if len(own) == 1:
            identity = {key: value for key, value in run.recipe.identity().items() if key not in ("name", "seed")}
            alike.setdefault(json.dumps([identity, sorted(run.datasets)], sort_keys=True), []).append((run, own[0]))
    found = []
    for pairs in alike.values():
        pairs.sort(key=lambda pair: pair[0].recipe.seed)
        seeds = [run.recipe.seed for run, _ in pairs]
        if len(pairs) > 1 and len(set(seeds)) == len(seeds):
            name = family_name([method.source.name for _, method in pairs])
            if name in {method.name for method in material.methods}:
                name += f" ({len(pairs)} pretrainings)"
            found.append(Family(name, [run for run, _ in pairs], [method for _, method in pairs]))
    return found


def family_name(names: Sequence[str]) -> str:
    """What names have in common, without a seed at the end; the first one's where that is nothing.

    >>> family_name(["dino_weak_0", "dino_weak_1"])
    'dino_weak'
    """
    if len(set(names)) == 1:
        return names[0]
    stripped = {re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d+$", "", name) for name in names}
    return stripped.pop() if len(stripped) == 1 and "" not in stripped else f"{names[0]} and {len(names) - 1} more"


def pretrained_together(material: Material, found: Sequence[Family]) -> list[Group]:
    """For each group that holds all members of a family a group of families.

    The value of a pretraining is the mean over all its classifiers, and pretrainings with the same seed are a pair:
    classifiers of one backbone are no repeats of pretraining.
    """
    made: dict[str, list[Measured]] = {}
    for group in material.groups:
        there = {one.method.name: one for one in group.measured}
        for family in found:
            if all(member.name in there for member in family.members):
                merged = _merged(family, [there[member.name] for member in family.members])
                made.setdefault(merged.evaluation.comparable(), []).append(merged)
    return [Group(key, measured, pretrainings=len(measured[0].evaluation.seeds)) for key, measured in made.items()]


def _merged(family: Family, parts: Sequence[Measured]) -> Measured:
    first = parts[0].evaluation
    units: list[Unit] = []
    predictions: list[Predictions] = []
    for run, part in zip(family.runs, parts, strict=True):
        for unit in part.evaluation.units:
            number = len(units)
            units.append(unit.model_copy(update={"number": number, "seed": run.recipe.seed, "repeat": 0}))
            of = part.predictions.of_unit(unit.number)
            numbers = np.full(len(of.row_R), number, np.int32)
            predictions.append(Predictions(numbers, of.row_R, of.patient_R, of.label_R, of.scores_RK))
    joined = Predictions.joined(predictions)
    resamples = RESAMPLES if all(summary.interval for summary in first.summaries) else 0
    source = _source(family)
    evaluation = first.model_copy(
        update={
            "source": source,
            "seeds": [run.recipe.seed for run in family.runs],
            "units": units,
            "summaries": summarise(units, joined, first.data.classes, resamples=resamples),
            "seconds": sum(part.evaluation.seconds for part in parts),
        }
    )
    return Measured(Method(family.name, source), evaluation, joined)


def _source(family: Family) -> SourceRecord:
    records = [member.source for member in family.members]
    shared = {
        key: value for key, value in records[0].about.items() if all(one.about.get(key) == value for one in records)
    }
    joined = hashlib.sha256("".join(record.sha256 for record in records).encode()).hexdigest()
    seeds = ", ".join(str(run.recipe.seed) for run in family.runs)
    about = {"pretrainings": len(records), "seeds": seeds, **shared}
    return SourceRecord(name=family.name, kind="run", sha256=joined, architecture=records[0].architecture, about=about)
