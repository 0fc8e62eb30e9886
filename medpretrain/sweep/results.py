"""What came of a sweep, from its folder alone: a row for each run, evaluation and label fraction."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from medpretrain.evaluation.results import FORMAT, VERSION, Evaluation, Interval, read_record
from medpretrain.sweep.expand import SEED
from medpretrain.sweep.folder import RESULTS, Folder, Plan, PlannedRun
from medpretrain.sweep.sweep_file import METRICS, Value
from medpretrain.whole import whole_file

CSV = "sweep.csv"
State = Literal["done", "trained", "not done"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Record):
    """One evaluation of a run at one label fraction."""

    protocol: str
    variant: str
    label: str
    data: str
    fraction: float
    """Percent of the labelled training patients."""
    units: int
    mean: dict[str, float]
    interval: dict[str, Interval]
    file: str
    """In RUN/evaluation."""

    @property
    def series(self) -> str:
        """What tells it from other evaluations of the same run."""
        return f"{self.protocol} ({self.variant}), {self.label} of {self.data}, {self.fraction:g} % of labels"


class Row(_Record):
    """A run, and what was measured of it."""

    number: int
    run: str
    state: State
    axes: dict[str, Value]
    measured: tuple[Measured, ...]


class SweepResults(_Record):
    """All that is known of a sweep, done or not."""

    format: Literal["medpretrain sweep"] = "medpretrain sweep"
    version: Literal[1] = 1
    plan: Plan
    rows: tuple[Row, ...]

    @property
    def metric(self) -> str:
        return self.plan.sweep.metric

    @property
    def series(self) -> list[str]:
        """The evaluations that any run has, in the order in which they were asked for."""
        return list(dict.fromkeys(one.series for row in self.rows for one in row.measured))

    @property
    def axes(self) -> list[str]:
        """What is varied, the seed last."""
        return list(dict.fromkeys(axis for row in self.rows for axis in row.axes))


def results_of(folder: Folder) -> SweepResults:
    """Read what is in a sweep's folder.

    Raises:
        UserError: no sweep's folder, or a file in it was changed.
    """
    plan = folder.plan()
    return SweepResults(plan=plan, rows=tuple(_row(folder, plan, run) for run in plan.runs))


def _row(folder: Folder, plan: Plan, run: PlannedRun) -> Row:
    done = folder.done(run)
    measured: list[Measured] = []
    for names in done.evaluations.values() if done else ():
        for name in names:
            evaluation = read_record(folder.evaluations(run.name) / name, Evaluation, FORMAT, VERSION)
            if evaluation.source.kind != "random":  # what --baseline random leaves beside it
                measured += _measured(evaluation, name)
    whole = done is not None and len(done.evaluations) >= len(plan.sweep.evaluate)
    state: State = "done" if whole else "trained" if done else "not done"
    return Row(number=run.number, run=run.name, state=state, axes=run.axes, measured=tuple(measured))


def _measured(evaluation: Evaluation, file: str) -> list[Measured]:
    return [
        Measured(
            protocol=evaluation.protocol,
            variant=evaluation.variant,
            label=evaluation.data.label,
            data=evaluation.data.test_name,
            fraction=summary.fraction,
            units=summary.units,
            mean=summary.mean,
            interval=summary.interval,
            file=file,
        )
        for summary in evaluation.summaries
    ]


class Point(_Record):
    """A metric over the seeds of otherwise equal runs."""

    axes: dict[str, Value]
    """Without the seed."""
    value: float
    low: float | None
    high: float | None
    """Over seeds, one standard deviation (ddof 1) around the mean; of one seed, the 95 % interval by patients."""
    seeds: int


def points(results: SweepResults, series: str) -> list[Point]:
    """The figure's metric of one evaluation, a point for each choice of the axes that has any, in the order of runs."""
    groups: dict[tuple[tuple[str, Value], ...], list[Measured]] = {}
    for row in results.rows:
        where = tuple((axis, value) for axis, value in row.axes.items() if axis != SEED)
        groups.setdefault(where, []).extend(one for one in row.measured if one.series == series)
    return [_point(dict(where), found, results.metric) for where, found in groups.items() if found]


def _point(axes: dict[str, Value], found: Sequence[Measured], metric: str) -> Point:
    values = [one.mean[metric] for one in found]
    value = statistics.fmean(values)
    if len(values) > 1:
        sd = statistics.stdev(values)
        return Point(axes=axes, value=value, low=value - sd, high=value + sd, seeds=len(values))
    interval = found[0].interval.get(metric)
    low, high = (interval.low, interval.high) if interval else (None, None)
    return Point(axes=axes, value=value, low=low, high=high, seeds=1)


def write_results(folder: Folder, results: SweepResults) -> None:
    """Write sweep.json and sweep.csv; both are whole or as they were."""
    with whole_file(folder.path / RESULTS) as partial:
        partial.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    with whole_file(folder.path / CSV) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(csv_rows(results))


def csv_rows(results: SweepResults) -> list[list[object]]:
    """A header, then a line for each run and what was measured of it; a run without a result has one too."""
    axes = results.axes
    said = ("protocol", "variant", "label", "data", "fraction", "units")
    figures = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    lines: list[list[object]] = [["number", "run", "state", *axes, *said, *figures]]
    for row in results.rows:
        start = [row.number, row.run, row.state, *(row.axes.get(axis, "") for axis in axes)]
        for one in row.measured:
            numbers: list[object] = []
            for metric in METRICS:
                interval = one.interval.get(metric)
                numbers.append(one.mean.get(metric, ""))
                numbers += [interval.low, interval.high] if interval else ["", ""]
            lines.append([*start, *(getattr(one, name) for name in said), *numbers])
        if not row.measured:
            lines.append([*start, *[""] * (len(said) + len(figures))])
    return lines


def table(results: SweepResults) -> Table:
    """A line a run, for the terminal: its axes, and the figure's metric of each evaluation with its interval."""
    shown = Table(title=f"{results.plan.sweep.name}: {results.metric}")
    shown.add_column("", justify="right")
    for axis in results.axes or ["run"]:
        shown.add_column(axis)
    for series in results.series:
        shown.add_column(series, justify="right")
    shown.add_column("state")
    for row in results.rows:
        cells = [_cell(row, series, results.metric) for series in results.series]
        axes = [str(row.axes.get(axis, "")) for axis in results.axes] or [row.run]
        shown.add_row(str(row.number), *axes, *cells, row.state)
    return shown


def _cell(row: Row, series: str, metric: str) -> str:
    found = [one for one in row.measured if one.series == series]
    if not found:
        return "-"
    (one,) = found[-1:]
    interval = one.interval.get(metric)
    return f"{one.mean[metric]:.4f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else "")
