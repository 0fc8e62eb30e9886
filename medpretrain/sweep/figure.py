"""The figure of a sweep: a matrix of pairs, bars with one left out, or a line along an axis."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medpretrain.sweep.expand import FIRST, NOTHING, RECIPE, REMOVED, SECOND
from medpretrain.sweep.folder import Folder
from medpretrain.sweep.results import Point, SweepResults, points
from medpretrain.whole import whole_file

FIGURES = ("sweep.png", "sweep.svg")
_METADATA: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_INK, _FAINT = "#333333", "#dddddd"
# Okabe and Ito 2008: told apart by those who do not see red or green, too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
_LOGARITHMIC = 12  # from this ratio of the largest to the smallest value on

_log = logging.getLogger(__name__)


def draw(folder: Folder, results: SweepResults) -> list[Path]:
    """Draw the figure's metric as far as it was measured.

    Returns:
        sweep.png and sweep.svg; none where nothing was measured, or matplotlib is not installed, which is warned of.
    """
    shown = {series: points(results, series) for series in results.series}
    if not shown:
        return []
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        _log.warning("no figure is drawn: matplotlib, of the train extra, cannot be imported (%s)", error)
        return []
    style = {"font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "sweep", "text.color": _INK}
    style |= {"axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    with rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        sweep = results.plan.sweep
        figure.suptitle(sweep.about or sweep.name, fontsize=11)
        axis = _numeric_axis(results)
        if sweep.pairs is None and axis is not None:
            _lines(figure, shown, axis, results)
        else:
            _panels(figure, shown, results)
        files = [folder.path / name for name in FIGURES]
        for file in files:
            with whole_file(file) as partial:
                figure.savefig(partial, format=file.suffix[1:], dpi=150, metadata=_METADATA[file.suffix])
            figure.set_layout_engine("none")  # found for the first file, and good for the second
    return files


def _numeric_axis(results: SweepResults) -> str | None:
    """The first axis of the grid all of whose values are numbers."""
    for axis in results.plan.sweep.grid:
        if axis.values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values):
            return axis.name
    return None


def _lines(figure: Any, shown: dict[str, list[Point]], axis: str, results: SweepResults) -> None:
    """Every evaluation, recipe and other axis is a line along the numeric one."""
    figure.set_size_inches(6.4, 4.4)
    axes = figure.add_subplot()
    title, labels = _told_apart(list(shown))
    lines: dict[str, list[Point]] = {}
    for series, measured in shown.items():
        for point in measured:
            rest = [str(value) for name, value in point.axes.items() if name != axis]
            label = ", ".join(word for word in (*rest, labels[series]) if word)
            lines.setdefault(label, []).append(point)
    where: set[float] = set()
    for number, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda point: float(point.axes[axis]))
        x = [float(point.axes[axis]) for point in line]
        where.update(x)
        axes.errorbar(
            x,
            [point.value for point in line],
            yerr=_errors(line),
            label=label,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.4,
            capsize=2,
        )
    ticks = sorted(where)
    if ticks[0] > 0 and ticks[-1] / ticks[0] >= _LOGARITHMIC:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_ylabel(results.metric)
    axes.set_title(title, loc="left")
    if any(lines):
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    _plain(axes, grid="both")


def _told_apart(series: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What all series have in common, and what is left of each.

    >>> _told_apart(["knn, class, 1 %", "knn, class, 5 %"])
    ('knn, class', {'knn, class, 1 %': '1 %', 'knn, class, 5 %': '5 %'})
    """
    parts = [one.split(", ") for one in series]
    common = [word for word in parts[0] if all(word in words for words in parts)]
    rest = {
        one: ", ".join(word for word in words if word not in common) for one, words in zip(series, parts, strict=True)
    }
    return ", ".join(common), rest


def _panels(figure: Any, shown: dict[str, list[Point]], results: SweepResults) -> None:
    """A matrix of pairs or bars for each evaluation and recipe."""
    panels: dict[str, list[Point]] = {}
    for series, measured in shown.items():
        for point in measured:
            recipe = point.axes.get(RECIPE)
            panels.setdefault(f"{recipe}: {series}" if recipe else series, []).append(point)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure.set_size_inches(5.6 * columns, 4.4 * lines + 0.4)
    for number, (title, measured) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, number)
        axes.set_title(title, loc="left")
        if results.plan.sweep.pairs is not None:
            _matrix(figure, axes, measured, results)
        else:
            _bars(axes, measured, results)


def _matrix(figure: Any, axes: Any, measured: Sequence[Point], results: SweepResults) -> None:
    planned = [run.axes[side] for run in results.plan.runs for side in (FIRST, SECOND)]
    names = [str(name) for name in dict.fromkeys(planned)]
    values = [[math.nan] * len(names) for _ in names]
    together = results.plan.sweep.pairs is not None and results.plan.sweep.pairs.how == "together"
    for point in measured:
        i, j = names.index(str(point.axes[FIRST])), names.index(str(point.axes[SECOND]))
        values[i][j] = point.value
        if together:  # one run for both
            values[j][i] = point.value
    known = [value for row in values for value in row if not math.isnan(value)]
    image = axes.imshow(values, cmap="viridis", vmin=min(known), vmax=max(known))  # NaN, not measured, stays white
    middle = (min(known) + max(known)) / 2
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if value < middle else "black"
                axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("one" if together else "on the first view")
    axes.set_xlabel("and the other" if together else "on the second view")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=results.metric, shrink=0.85)


def _bars(axes: Any, measured: Sequence[Point], results: SweepResults) -> None:
    """A bar a point; where transformations are left out, the whole pipeline is a line to compare with."""
    labels = [_bar_label(point) for point in measured]
    place = range(len(measured), 0, -1)
    colours = [_COLOURS[5] if point.axes.get(REMOVED) == NOTHING else _COLOURS[4] for point in measured]
    values = [point.value for point in measured]
    axes.barh(place, values, xerr=_errors(measured), color=colours, height=0.7, capsize=2, ecolor=_INK)
    for at, point in zip(place, measured, strict=True):
        axes.text(0.005, at, f"{point.value:.3f}", va="center", color="black", fontsize=8)
    for point in measured:
        if point.axes.get(REMOVED) == NOTHING:
            axes.axvline(point.value, color=_INK, linewidth=1, linestyle="--")
    axes.set_yticks(place, labels)
    axes.set_xlabel(results.metric)
    _plain(axes, grid="x")


def _bar_label(point: Point) -> str:
    removed = point.axes.get(REMOVED)
    if removed is not None:
        return "all transformations" if removed == NOTHING else f"without {removed}"
    return ", ".join(f"{axis} {value}" for axis, value in point.axes.items() if axis != RECIPE)


def _errors(measured: Sequence[Point]) -> list[list[float]] | None:
    """What errorbar takes: below and above; a point without an interval has none."""
    if all(point.low is None for point in measured):
        return None
    low = [max(0.0, point.value - point.low) if point.low is not None else 0.0 for point in measured]
    high = [max(0.0, point.high - point.value) if point.high is not None else 0.0 for point in measured]
    return [low, high]


def _plain(axes: Any, grid: str) -> None:
    axes.grid(True, axis=grid, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(length=0)
