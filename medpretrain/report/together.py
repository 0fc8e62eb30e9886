"""Runs that differ in nothing but their seed are one method, pretrained several times: their evaluations as one.

A pretraining counts once however often it was evaluated: folds and repeats of one backbone say nothing of pretraining
again, and as pairs of a test they would make three pretrainings look like nine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medpretrain.evaluation.intervals import RESAMPLES, summarise
from medpretrain.evaluation.results import SEED, SETTING, Predictions, SourceRecord, Unit
from medpretrain.report.gather import Group, Material, Measured, Method, rank


@dataclass(frozen=True)
class Family:
    """Several pretrainings, or initialisations, by one recipe.

    Attributes:
        name: as shown.
        members: the methods that were evaluated, by seed.
    """

    name: str
    members: list[Method]

    @property
    def seeds(self) -> list[int]:
        return [_seed(member) for member in self.members]


def _seed(method: Method) -> int:
    return int(method.source.about[SEED] or 0)


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
    """Sources of one setting, pretrained on the same data, each with another seed."""
    alike: dict[tuple[object, ...], list[Method]] = {}
    for method in material.methods:
        about = method.source.about
        if about.get(SETTING) and SEED in about:
            key = about[SETTING], method.source.kind, about.get("dataset_sha256"), about.get("step")
            alike.setdefault(key, []).append(method)
    found: list[Family] = []
    for members in alike.values():
        members.sort(key=_seed)
        family = Family(family_name([method.source.name for method in members]), members)
        if len(members) > 1 and len(set(family.seeds)) == len(members):
            taken = {method.name for method in material.methods} | {other.name for other in found}
            times = f" ({len(members)} seeds)" if family.name in taken else ""
            found.append(Family(family.name + times, members))
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
    for seed, part in zip(family.seeds, parts, strict=True):
        for unit in part.evaluation.units:
            number = len(units)
            units.append(unit.model_copy(update={"number": number, "seed": seed, "repeat": 0}))
            of = part.predictions.of_unit(unit.number)
            numbers = np.full(len(of.row_R), number, np.int32)
            predictions.append(Predictions(numbers, of.row_R, of.patient_R, of.label_R, of.scores_RK))
    joined = Predictions.joined(predictions)
    resamples = RESAMPLES if all(summary.interval for summary in first.summaries) else 0
    source = _source(family)
    evaluation = first.model_copy(
        update={
            "source": source,
            "seeds": family.seeds,
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
    kind = records[0].kind
    about = {
        "initialisations" if kind == "random" else "pretrainings": len(records),
        "seeds": ", ".join(map(str, family.seeds)),
        **shared,
    }
    return SourceRecord(name=family.name, kind=kind, sha256=joined, architecture=records[0].architecture, about=about)
