"""Evaluations as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from data_prep.errors import UserError
from medpretrain.evaluation.imbalance import Imbalance
from medpretrain.evaluation.results import Evaluation, Summary, Value
from medpretrain.evaluation.space_record import SpaceRecord

MEASURES = {
    "sad": "SAD, sample alignment distance",
    "saa": "SAA, sample alignment accuracy",
    "cad": "CAD, class alignment distance",
    "cac": "CAC, class alignment consistency",
    "gpu": "GPU, Gaussian potential uniformity",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "rankme": "RankMe",
    "feature_std": "feature std",
}
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
    said = [f"{often}; {len(units)} classifier{'s' * (len(units) > 1)}, seeds {', '.join(map(str, first.seeds))}"]
    if many == 1:
        said[0] += f"; {units[0].n_train} train, {units[0].n_test} test images"
    settings: dict[str, Value] = dict(first.parameters)
    for name in ("k", "C"):
        used = {unit.parameters.get(name) for one in evaluations for unit in one.units} - {None}
        if used:
            settings[name] = used.pop() if len(used) == 1 else "as it was chosen in each"
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


def space_table(record: SpaceRecord) -> Table:
    """The measures of a representation space."""
    data = record.data
    shown = Table(title=f"{record.source.name}: {data.n_images} images of {data.name}, split {data.split!r}")
    shown.add_column(f"{record.views} views, of {'its own kind' if record.view_from == 'source' else record.view_from}")
    shown.add_column(record.source.name, justify="right")
    for name, value in record.metrics.model_dump().items():
        shown.add_row(MEASURES[name], "not defined" if value is None else f"{value:.4f}")
    if data.n_images < data.n_labelled:
        shown.caption = f"a stratified part of {data.n_labelled} images"
    return shown


def imbalance_table(measured: Imbalance, title: str) -> Table:
    """The columns of AMIMV-SSL's Table 1, and the counts they are of."""
    shown = Table(title=title)
    for name in ("IR", "CV", "NE", "GI", "RCR", "FB/PI/I"):
        shown.add_column(name, justify="right")
    shown.add_row(
        f"{measured.imbalance_ratio:.2f}",
        f"{measured.coefficient_of_variation:.2f}",
        f"{measured.normalized_entropy:.2f}",
        f"{measured.gini:.2f}",
        f"{measured.rare_class_ratio:.2f}",
        measured.category,
    )
    shown.caption = ", ".join(f"{name} {n}" for name, n in zip(measured.classes, measured.counts, strict=True))
    return shown
