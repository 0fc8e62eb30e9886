"""Evaluations as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from data_prep.errors import UserError
from medpretrain.evaluation.results import Evaluation, Summary, Value

SHOWN = ("accuracy", "balanced_accuracy", "auroc", "aupr")


def table(evaluations: Sequence[Evaluation]) -> Table:
    """A row a metric and fraction, a column a source; beside two, their difference.

    Args:
        evaluations: at least one; of the same protocol, settings and images.

    Raises:
        UserError: they were not measured on the same thing.
    """
    first = evaluations[0]
    if any(one.comparable() != first.comparable() for one in evaluations):
        raise UserError("these evaluations differ in protocol, settings or images; compare like with like")
    data = first.data
    of_test = "" if data.test_sha256 == data.sha256 else f", measured on {data.test_name}"
    shown = Table(title=f"{first.title}, label {data.label!r} of {data.name}{of_test}")
    shown.add_column("mean, 95 % interval by patients")
    for one in evaluations:
        shown.add_column(one.source.name, justify="right")
    if len(evaluations) == 2:
        shown.add_column("difference", justify="right")
    for place, summary in enumerate(first.summaries):
        images = first.units[[unit.fraction for unit in first.units].index(summary.fraction)]
        if len(first.summaries) > 1:
            shown.add_section()
            shown.add_row(f"[bold]{summary.fraction:g} % of labels[/]: {images.n_train} train, {images.n_test} test")
        for metric in SHOWN:
            cells = [_cell(one.summaries[place], metric) for one in evaluations]
            if len(evaluations) == 2:
                ours, other = (one.summaries[place].mean[metric] for one in evaluations)
                cells.append(f"{ours - other:+.4f}")
            shown.add_row(metric, *cells)
    shown.caption = "\n".join(notes(evaluations))
    return shown


def notes(evaluations: Sequence[Evaluation]) -> list[str]:
    """What a reader of the numbers must know."""
    first = evaluations[0]
    units, data = first.units, first.data
    often = f"{first.folds} folds x {first.repeats}" if first.folds else "the dataset's own splits"
    many = len({unit.fraction for unit in units})
    said = [f"{often}; {len(units)} classifiers, seeds {', '.join(map(str, first.seeds))}"]
    if many == 1:
        said[0] += f"; {units[0].n_train} train, {units[0].n_test} test images"
    used = units[0].parameters
    settings: dict[str, Value] = {**first.parameters, **{name: used[name] for name in ("k", "C") if name in used}}
    if settings:
        said.append(", ".join(f"{name} {value}" for name, value in settings.items()))
    if data.patients != "known":
        said.append(f"patients are {data.patients}: the interval takes each image without one for a patient of its own")
    left_out = ", ".join(f"{count} of {split}" for split, count in data.left_out.items() if count)
    if left_out:
        said.append(f"left out for want of a label: {left_out}")
    stopped = sum(unit.parameters.get("converged") is False for one in evaluations for unit in one.units)
    if stopped:
        said.append(f"{stopped} linear probes did not converge")
    return said


def _cell(summary: Summary, metric: str) -> str:
    interval = summary.interval.get(metric)
    return f"{summary.mean[metric]:.4f}" + (f" ({interval.low:.3f}, {interval.high:.3f})" if interval else "")
