"""`curves.png` and `curves.svg` of a run folder: what was measured, over the steps."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medpretrain.tracking.metrics_log import Row, read_metrics

# Column, title, logarithmic axis.
_PANELS = (
    ("loss", "loss", False),
    ("lr", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("images_per_s", "images/s", False),
    ("rankme", "RankMe", False),
    ("feature_std", "feature std", False),
)
_MOST_POINTS = 300
# Without them the same metrics give the same bytes.
_METADATA: dict[str, dict[str, str | None]] = {".png": {"Software": None}, ".svg": {"Date": None}}
_COLOUR, _INK, _FAINT = "#2f6f9f", "#333333", "#d9d9d9"

_log = logging.getLogger(__name__)


def draw_curves(run: Path) -> list[Path]:
    """Draw loss, learning rate, gradient norm, images/s, RankMe and feature std, as far as the run measured them.

    Values that are not finite are left out. Of more than 300 rows the line is the mean of as many as fall together, and
    the shade behind it goes from their smallest to their largest.

    Returns:
        The two files; none if there is nothing to draw or matplotlib is not installed, which is warned of.

    Raises:
        UserError: the metrics cannot be read.
    """
    rows = read_metrics(run / "metrics.jsonl")
    panels = [panel for panel in _PANELS if any(_number(row, panel[0]) is not None for row in rows)]
    if not panels:
        return []
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        _log.warning("no curves are drawn: matplotlib, of the train extra, cannot be imported (%s)", error)
        return []
    style = {
        "font.size": 9,
        "axes.titlesize": 10,
        "svg.hashsalt": "curves",
        "text.color": _INK,
        "axes.labelcolor": _INK,
    }
    with rc_context(style):
        columns = min(3, len(panels))
        lines = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(3.8 * columns, 2.5 * lines + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(run.resolve().name, fontsize=11, color=_INK)
        for number, (name, title, logarithmic) in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, number)
            given = [(row["step"], value) for row in rows if (value := _number(row, name)) is not None]
            _draw(axes, given)
            axes.set_title(title, loc="left", color=_INK)
            values = [value for _, value in given]
            if logarithmic and 0 < 30 * min(values) < max(values):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            if number > len(panels) - columns:
                axes.set_xlabel("step")
        files = [run / "curves.png", run / "curves.svg"]
        for file in files:
            temporary = file.with_name(f".tmp-{file.name}")
            figure.savefig(temporary, format=file.suffix[1:], dpi=150, metadata=_METADATA[file.suffix])
            os.replace(temporary, file)
            figure.set_layout_engine("none")  # found for the first file, and good for the second
    return files


def _draw(axes: Any, given: Sequence[tuple[int, float]]) -> None:
    every = math.ceil(len(given) / _MOST_POINTS)
    groups = [given[start : start + every] for start in range(0, len(given), every)]
    steps = [group[-1][0] for group in groups]
    values = [[value for _, value in group] for group in groups]
    if every > 1:
        axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=_COLOUR, alpha=0.2, linewidth=0)
    means = [math.fsum(group) / len(group) for group in values]
    axes.plot(steps, means, color=_COLOUR, linewidth=1.4, marker="o" if len(means) < 3 else None, markersize=3)
    axes.grid(True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.margins(x=0.02)


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
