"""Training curves of several runs over one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from medpretrain.report.drawing import Look, Picture, finished, legend_below, legend_height, panel
from medpretrain.report.gather import Run

# Column of metrics.jsonl, title, logarithmic axis where the values span much.
PANELS = (
    ("loss", "Loss", False),
    ("lr", "Learning rate", False),
    ("grad_norm", "Gradient norm", True),
    ("feature_std", "Feature std", False),
    ("rankme", "RankMe", False),
    ("uniformity", "Uniformity", False),
    ("alignment", "Alignment", False),
    ("images_per_s", "Images/s", False),
)
_MOST_POINTS = 200
_WIDE_SPAN = 30


def points(run: Run, column: str) -> list[tuple[int, float]]:
    """Steps and finite values of one metric."""
    given = [(row["step"], row.get(column)) for row in run.rows]
    return [(step, float(value)) for step, value in given if isinstance(value, int | float) and math.isfinite(value)]


def thinned(given: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> tuple[list[float], list[float]]:
    """Steps and means of at most `most` stretches of equal length."""
    every = math.ceil(len(given) / most)
    parts = [given[start : start + every] for start in range(0, len(given), every)]
    means = [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]
    return [float(step) for step, _ in means], [value for _, value in means]


def run_pictures(runs: Sequence[Run], look: Mapping[str, Look]) -> list[Picture]:
    """A panel a metric that any run measured; values that are not finite are left out."""
    pictures = []
    for column, title, logarithmic in PANELS:
        drawn = {run.name: found for run in runs if (found := points(run, column))}
        if not drawn:
            continue
        with panel(height=2.25 + legend_height(list(drawn))) as (figure, axes):
            for name, given in drawn.items():
                steps, values = thinned(given)
                style = look[name]
                single = style.marker if len(steps) < 3 else None
                axes.plot(steps, values, color=style.colour, ls=style.dash, lw=1.3, label=name, marker=single)
            every = np.array([value for given in drawn.values() for _, value in given])
            if logarithmic and 0 < _WIDE_SPAN * every.min() < every.max():
                axes.set_yscale("log")
            axes.set(title=title, xlabel="step")
            axes.margins(x=0.02)
            legend_below(figure, axes)
            ends = ", ".join(f"{name} ends at {given[-1][1]:.3g}" for name, given in drawn.items())
            without = [run.name for run in runs if run.name not in drawn]
            pictures.append(
                finished(
                    figure,
                    f"training-{column.replace('_', '-')}",
                    caption=f"{title} over steps" + (f"; not measured by {', '.join(without)}" if without else ""),
                    alt=f"{title} over the steps of training: {ends}",
                )
            )
    return pictures
