"""The head of the page: what was compared, on what, what came out, and what a reader must know before believing it."""

from __future__ import annotations

from collections.abc import Mapping

from medpretrain.evaluation.comparison import ALPHA
from medpretrain.report.comparing import Tests
from medpretrain.report.figures_scores import summary_at
from medpretrain.report.gather import Group, Material
from medpretrain.report.section_results import title
from medpretrain.report.words import METRIC_NAMES, PROTOCOL_NAMES, count, listed, number, p_value, signed

MAIN_METRIC = "auroc"


def compared(material: Material) -> str:
    """One sentence: the methods, and how they were measured."""
    members = {name for names in material.families.values() for name in names}
    names = [method.name for method in material.methods if method.name not in members]
    shown = names if len(names) <= 8 else [*names[:7], f"{len(names) - 7} more"]
    protocols = list(dict.fromkeys(PROTOCOL_NAMES[group.first.protocol] for group in material.groups))
    how = f", by {listed(protocols)}" if protocols else ", by their feature space"
    times = f", {len(members)} pretrainings" if members else ""
    return f"{listed(shown)} ({count(len(names), 'backbone')}{times}{how})."


def tested_on(material: Material) -> str:
    """One sentence: the data."""
    found: dict[str, None] = {}
    for group in material.groups:
        data = group.first.data
        where = data.name if data.test_sha256 == data.sha256 else f"{data.name}, tested on {data.test_name}"
        classes = f"{len(data.classes)} classes of {data.label}"
        found.setdefault(f"{where} ({classes}, {sum(data.test_counts):,} test images, patients {data.patients})")
    for _, space in material.spaces:
        if not material.groups:
            found.setdefault(f"{space.record.data.name} ({space.record.data.n_images:,} images)")
    return "; ".join(found) + "."


def main_result(group: Group, tests: Tests, metric: str = MAIN_METRIC) -> str:
    """One sentence: the best method of the first group, its interval, and whether it is really better."""
    fraction = group.fractions[-1]
    found = [(one.method.name, summary_at(one.evaluation, fraction)) for one in group.measured]
    found.sort(key=lambda pair: -pair[1].mean[metric])
    name, summary = found[0]
    interval = summary.interval.get(metric)
    bounds = f" (95 % interval {number(interval.low)} to {number(interval.high)})" if interval else " (no interval)"
    said = f"{METRIC_NAMES[metric]} {number(summary.mean[metric])}{bounds}"
    where = title(group)
    if len(found) == 1:
        return f"{where}: {name} reaches {said}."
    second = found[1][0]
    pair = tests.between(name, second, metric)
    gap = f"{summary.mean[metric] - found[1][1].mean[metric]:.3f} above {second}"
    if pair is None:
        return f"{where}: {name} is highest with {said}, {gap}; whether that is more than chance was not tested."
    p = f"p {p_value(pair.p_holm)}" if pair.p_holm < 0.001 else f"p = {p_value(pair.p_holm)}"
    again = (
        f"trained again it stays better ({p}, Wilcoxon, Holm)"
        if pair.significant
        else f"{count(pair.pairs, 'repeat')} cannot tell whether it stays better when trained again"
        if pair.least_p_holm > ALPHA
        else f"trained again it could be otherwise ({p}, Wilcoxon, Holm)"
    )
    if pair.interval is not None:
        ends = sorted(
            (pair.interval.low, pair.interval.high) if pair.first == name else (-pair.interval.high, -pair.interval.low)
        )
        gap += f" (95 % interval over patients {signed(ends[0])} to {signed(ends[1])})"
    return f"{where}: {name} is highest with {said}, {gap}; {again}."


def warnings(material: Material, tests: Mapping[str, Tests], shows_patients: bool) -> list[str]:
    """What a reader must know first.

    Args:
        tests: of the main metric, by a group's key.
    """
    found = []
    if shows_patients:
        found.append(
            "Images of patients are on this page: pass it on only where these images may go (--no-images makes one "
            "without)."
        )
    found += _of_data(material)
    for group in material.groups:
        for one in group.measured:
            failed = [unit for unit in one.evaluation.units if unit.parameters.get("converged") is False]
            if failed:
                found.append(
                    f"{title(group)}: {len(failed)} of {count(len(one.evaluation.units), 'classifier')} of "
                    f"{one.method.name} did not converge; its numbers may be too low."
                )
        without = [one.method.name for one in group.measured if not all(s.interval for s in one.evaluation.summaries)]
        if without:
            found.append(f"{title(group)}: no interval is known of {listed(without)}.")
    return [*found, *_too_few(material, tests), *(note + "." for note in material.notes)]


def _too_few(material: Material, tests: Mapping[str, Tests]) -> list[str]:
    """Where no p-value can be small, by how many repeats there are."""
    alike: dict[tuple[int, int], list[str]] = {}
    reach: dict[tuple[int, int], float] = {}
    for group in material.groups:
        pairs = tests[group.key].of(MAIN_METRIC)
        if pairs and pairs[0].least_p_holm > ALPHA and not group.in_short:
            key = pairs[0].pairs, pairs[0].family
            alike.setdefault(key, []).append(title(group))
            reach[key] = pairs[0].least_p_holm
    return [
        f"{'; '.join(titles)}: {count(repeats, 'repeat')} and {count(family, 'comparison')} can give no p below "
        f"{p_value(reach[repeats, family])} after Holm's correction, whatever the numbers are; a claim needs more "
        "repeats or seeds."
        for (repeats, family), titles in alike.items()
    ]


def _of_data(material: Material) -> list[str]:
    found: dict[str, None] = {}
    for group in material.groups:
        data = group.first.data
        if data.patients != "known":
            found.setdefault(
                f"{data.name}: patients are {data.patients}, so nothing shows that no patient is in both training and "
                "test; each image of an unknown patient counts as a patient of its own, and intervals may be too "
                "narrow."
            )
        left = ", ".join(f"{n:,} of {split}" for split, n in data.left_out.items() if n)
        if left:
            found.setdefault(f"{data.name}: images without {data.label} were left out on request: {left}.")
    for method, space in material.spaces:
        data_of_space = space.record.data
        if data_of_space.left_out:
            found.setdefault(
                f"{data_of_space.name}: {count(data_of_space.left_out, 'image')} of {data_of_space.split} without "
                f"{data_of_space.label} are not in the feature space of {method.name}."
            )
    pretrained: dict[tuple[str, ...], list[str]] = {}
    for run in material.runs:
        if run.datasets:
            pretrained.setdefault(tuple(sorted(run.datasets)), []).append(run.name)
    if len(pretrained) > 1:
        parts = [f"{listed(names)} on {', '.join(sha[:12] for sha in shas)}" for shas, names in pretrained.items()]
        found.setdefault(f"The runs were pretrained on different data: {'; '.join(parts)}.")
    return list(found)
