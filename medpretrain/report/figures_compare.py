"""The comparison as intervals beside one another, and metrics over the share of labels."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.ticker import FixedLocator, NullLocator

from medpretrain.report.drawing import Look, Picture, finished, legend_below, legend_height, panel, shortened
from medpretrain.report.figures_scores import summary_at
from medpretrain.report.gather import Group
from medpretrain.report.words import LOWER_IS_BETTER, METRIC_NAMES

EFFICIENCY = ("auroc", "aupr", "balanced_accuracy", "accuracy", "f1", "brier")


def interval_picture(group: Group, fraction: float, look: Mapping[str, Look], stem: str, metric: str) -> Picture:
    """A dot and its interval a method, best on top."""
    found = [(one.method.name, summary_at(one.evaluation, fraction)) for one in group.measured]
    found.sort(key=lambda pair: pair[1].mean[metric], reverse=metric not in LOWER_IS_BETTER)
    title = METRIC_NAMES[metric]
    with panel(height=0.85 + 0.3 * len(found)) as (figure, axes):
        for place, (name, summary) in enumerate(found):
            style, value, interval = look[name], summary.mean[metric], summary.interval.get(metric)
            if interval is not None:
                axes.hlines(place, interval.low, interval.high, color=style.colour, lw=2)
            axes.plot(value, place, marker=style.marker, color=style.colour, ms=6)
            axes.annotate(f"{value:.3f}", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        axes.set_yticks(range(len(found)), [shortened(name, 20) for name, _ in found])
        axes.set(ylim=(len(found) - 0.5, -0.7), title=f"{title}, 95 % interval")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        return finished(
            figure,
            f"{stem}-intervals-{metric.replace('_', '-')}",
            caption=f"{title}: mean and 95 % interval, bootstrap by patients",
            alt=f"{title} by method: " + ", ".join(f"{name} {summary.mean[metric]:.3f}" for name, summary in found),
        )


def efficiency_pictures(group: Group, look: Mapping[str, Look], stem: str) -> list[Picture]:
    """A panel a metric, over the percent of labelled training patients, logarithmic."""
    pictures = []
    for metric in EFFICIENCY:
        title = METRIC_NAMES[metric]
        with panel(height=2.4 + legend_height([one.method.name for one in group.measured])) as (figure, axes):
            for number, one in enumerate(group.measured):
                style = look[one.method.name]
                shift = 1 + 0.02 * (number - (len(group.measured) - 1) / 2)  # so that intervals stand side by side
                chosen = one.evaluation.summaries
                x = [summary.fraction * shift for summary in chosen]
                y = [summary.mean[metric] for summary in chosen]
                axes.plot(x, y, color=style.colour, ls=style.dash, marker=style.marker, ms=4.5, label=one.method.name)
                known = [
                    (at, summary.interval[metric])
                    for at, summary in zip(x, chosen, strict=True)
                    if metric in summary.interval
                ]
                if known:
                    bounds = [[interval.low for _, interval in known], [interval.high for _, interval in known]]
                    axes.vlines([at for at, _ in known], *bounds, color=style.colour, lw=1.1, alpha=0.8)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(group.fractions))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set(title=title, xlabel="labelled training patients, %")
            legend_below(figure, axes)
            least = group.fractions[0]
            at_least = ", ".join(
                f"{one.method.name} {summary_at(one.evaluation, least).mean[metric]:.3f}" for one in group.measured
            )
            pictures.append(
                finished(
                    figure,
                    f"{stem}-labels-{metric.replace('_', '-')}",
                    caption=f"{title} over the share of labelled training patients; bars: 95 % intervals",
                    alt=f"{title} over the share of labels; with {least:g} %: {at_least}",
                    choice=title,
                )
            )
    return pictures
