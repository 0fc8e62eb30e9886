"""ROC and precision-recall curves, confusion matrices, bars by class and reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MultipleLocator, PercentFormatter
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from medpretrain.evaluation.results import Evaluation, Summary, Unit
from medpretrain.report.drawing import Look, Picture, canvas, finished, legend_below, legend_height, panel, shortened
from medpretrain.report.gather import Group, Measured

Curve = NDArray[np.float64]
GRID: Curve = np.linspace(0, 1, 201)
MOST_CLASSES = 24
"""Panels of single classes; the page says what it leaves out."""
_SMALL_MATRIX = 6


def units_at(evaluation: Evaluation, fraction: float) -> list[Unit]:
    return [unit for unit in evaluation.units if unit.fraction == fraction]


def summary_at(evaluation: Evaluation, fraction: float) -> Summary:
    return next(summary for summary in evaluation.summaries if summary.fraction == fraction)


def roc_at_grid(is_class: NDArray[np.bool_], scores: Curve) -> Curve:
    """Sensitivity at the false positive rates of GRID, by straight lines between the thresholds' points."""
    false, true, _ = roc_curve(is_class, scores)
    last = np.r_[np.flatnonzero(np.diff(false)), len(false) - 1]  # of equal rates the highest point
    at = np.interp(GRID, false[last], true[last])
    at[0] = 0.0
    return at


def precision_at_grid(is_class: NDArray[np.bool_], scores: Curve) -> Curve:
    """Precision at the recalls of GRID: that of the highest threshold that reaches the recall, as in average
    precision."""
    precision, recall, _ = precision_recall_curve(is_class, scores)
    rising, value = recall[::-1], precision[::-1]
    place = np.searchsorted(rising, GRID - 1e-12, side="left").clip(1, len(rising) - 1)
    return value[place]


def mean_curves(one: Measured, fraction: float, kind: str) -> tuple[Curve, Curve]:
    """The curve of each class, (K, 201): mean and standard deviation over units."""
    at_grid = roc_at_grid if kind == "roc" else precision_at_grid
    curves = []
    for unit in units_at(one.evaluation, fraction):
        part = one.predictions.of_unit(unit.number)
        classes = range(len(one.evaluation.data.classes))
        curves.append([at_grid(part.label_R == k, part.scores_RK[:, k]) for k in classes])
    stacked = np.array(curves)
    return stacked.mean(axis=0), stacked.std(axis=0)


def curve_pictures(group: Group, fraction: float, look: Mapping[str, Look], kind: str, stem: str) -> list[Picture]:
    """ROC or precision-recall curves: one panel of all methods, then for more than two classes one a class."""
    classes = group.first.data.classes
    title = "ROC" if kind == "roc" else "Precision-recall"
    metric = "auroc" if kind == "roc" else "aupr"
    found = {one.method.name: mean_curves(one, fraction, kind) for one in group.measured}
    units = len(units_at(group.first, fraction))
    shade = "; shade: standard deviation over units" if units > 1 else ""
    averaged = f"mean of {units} units{shade}" if units > 1 else "one unit"
    pictures = []
    binary = len(classes) == 2
    of = f"class {classes[1]}" if binary else f"mean of {len(classes)} classes, each against the rest"
    with panel(height=2.75 + legend_height([f"{one.method.name}  0.000" for one in group.measured])) as (figure, axes):
        _curve_axes(axes, kind)
        for one in group.measured:
            mean, spread = found[one.method.name]
            line, band = (mean[1], spread[1]) if binary else (mean.mean(axis=0), spread.mean(axis=0))
            style = look[one.method.name]
            value = _scalar(one, fraction, metric, binary)
            axes.plot(GRID, line, color=style.colour, ls=style.dash, label=f"{one.method.name}  {value:.3f}")
            if units > 1 and binary:
                axes.fill_between(GRID, line - band, line + band, color=style.colour, alpha=0.13, lw=0)
        if kind == "pr" and binary:
            _base_rate(axes, group, 1)
        axes.set_title(f"{title}, {shortened(of, 20)}" if binary else f"{title}, mean of classes")
        legend_below(figure, axes)
        pictures.append(
            finished(
                figure,
                f"{stem}-{kind}",
                caption=f"{title} curve, {of}; {averaged}. Behind each name its {metric.upper()}"
                + (f" of {classes[1]}." if binary and metric == "aupr" else "."),
                alt=f"{title} curves of {_names(group)}, {of}",
            )
        )
    if not binary:
        for k, name in list(enumerate(classes))[:MOST_CLASSES]:
            pictures.append(_class_panel(group, fraction, look, kind, stem, found, k, name))
    return pictures


def _class_panel(
    group: Group,
    fraction: float,
    look: Mapping[str, Look],
    kind: str,
    stem: str,
    found: Mapping[str, tuple[Curve, Curve]],
    k: int,
    name: str,
) -> Picture:
    title = "ROC" if kind == "roc" else "Precision-recall"
    with panel(width=2.4, height=2.2) as (figure, axes):
        _curve_axes(axes, kind, small=True)
        for one in group.measured:
            style = look[one.method.name]
            axes.plot(GRID, found[one.method.name][0][k], color=style.colour, ls=style.dash, lw=1.3)
        if kind == "pr":
            _base_rate(axes, group, k)
        axes.set_title(shortened(name, 26), fontsize=8.5)
        return finished(
            figure,
            f"{stem}-{kind}-{k}",
            caption=f"{name} against the rest, {group.first.data.test_counts[k]:,} test images",
            alt=f"{title} curves of {_names(group)} for class {name} against the rest",
            choice=title,
        )


def _curve_axes(axes: Axes, kind: str, small: bool = False) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(0.25 if not small else 0.5))
    if kind == "roc":
        axes.plot([0, 1], [0, 1], color="#b6bec4", lw=0.9, ls=(0, (2, 2)))
        axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    else:
        axes.set(xlabel="recall", ylabel="precision")


def _base_rate(axes: Axes, group: Group, k: int) -> None:
    counts = group.first.data.test_counts
    axes.axhline(counts[k] / sum(counts), color="#b6bec4", lw=0.9, ls=(0, (2, 2)))


def _names(group: Group) -> str:
    return ", ".join(one.method.name for one in group.measured)


def _scalar(one: Measured, fraction: float, metric: str, binary: bool) -> float:
    """What stands behind a name: of two classes the AUPR of the drawn one, for the metric is of both."""
    if binary and metric == "aupr":
        return float(np.mean([unit.metrics.per_class[1].aupr for unit in units_at(one.evaluation, fraction)]))
    return summary_at(one.evaluation, fraction).mean[metric]


def confusion(one: Measured, fraction: float) -> NDArray[np.int64]:
    """Summed over units, (K, K): rows are true classes."""
    return np.sum([unit.metrics.confusion for unit in units_at(one.evaluation, fraction)], axis=0).astype(np.int64)


def confusion_pictures(group: Group, fraction: float, stem: str) -> list[Picture]:
    """A panel a method: counts, and shares of each row as colour and in words; two panels where they do not fit."""
    pictures = []
    classes = group.first.data.classes
    units = len(units_at(group.first, fraction))
    summed = f", summed over {units} units" if units > 1 else ""
    for number, one in enumerate(group.measured):
        counts = confusion(one, fraction)
        shares = counts / counts.sum(axis=1, keepdims=True)
        small = len(classes) <= _SMALL_MATRIX
        for what in ("both",) if small else ("counts", "shares"):
            texts = _cells(counts, shares, what) if len(classes) <= 16 else None
            side = 2.7 if small else min(6.0, 1.9 + 0.26 * len(classes))
            with panel(width=side + 0.4, height=side) as (figure, axes):
                _draw_matrix(axes, shares, texts, classes)
                axes.set_title(shortened(one.method.name, 30) + ("" if small else f", {what}"))
                shown = "images and share of the true class" if small else what
                pictures.append(
                    finished(
                        figure,
                        f"{stem}-confusion-{number}" + ("" if small else f"-{what}"),
                        caption=f"{one.method.name}: {shown}{summed}",
                        alt=f"Confusion matrix of {one.method.name}: " + _in_words(classes, shares),
                        wide=not small and side > 4.4,
                    )
                )
    return pictures


def _cells(counts: NDArray[np.int64], shares: Curve, what: str) -> list[list[str]]:
    def text(count: int, share: float) -> str:
        percent = f"{100 * share:.0f}%"
        return {"both": f"{count:,}\n{percent}", "counts": f"{count}", "shares": f"{100 * share:.0f}"}[what]

    return [
        [text(*pair) for pair in zip(*rows, strict=True)] for rows in zip(counts.tolist(), shares.tolist(), strict=True)
    ]


def _draw_matrix(axes: Axes, shares: Curve, texts: list[list[str]] | None, classes: Sequence[str]) -> None:
    blues = LinearSegmentedColormap.from_list("report", ["#ffffff", "#0072B2", "#00324f"])
    axes.imshow(shares, cmap=blues, vmin=0, vmax=1, interpolation="nearest")
    size = 8.5 if len(classes) <= _SMALL_MATRIX else 6.5 if len(classes) <= 11 else 5
    for row, line in enumerate(texts or []):
        for column, text in enumerate(line):
            colour = "white" if shares[row, column] > 0.42 else "#222222"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size, linespacing=1.25)
    ticks = range(len(classes))
    names = [shortened(name, 14) for name in classes]
    tilt = 0 if len(classes) <= 3 and max(map(len, names)) <= 10 else 90 if len(classes) > _SMALL_MATRIX else 35
    axes.set_xticks(ticks, names, rotation=tilt, ha="right" if tilt == 35 else "center")
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0, labelsize=7.5 if len(classes) <= 16 else 5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="called", ylabel="true class")


def _in_words(classes: Sequence[str], shares: Curve) -> str:
    parts = [f"{name} {100 * shares[k, k]:.0f} %" for k, name in enumerate(classes)]
    return "called right " + ", ".join(parts[:12]) + (", ..." if len(parts) > 12 else "")


def class_bars(
    group: Group,
    fraction: float,
    look: Mapping[str, Look],
    stem: str,
    intervals: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> list[Picture]:
    """Sensitivity, AUROC, AUPR and F1 of each class, a panel a metric.

    Args:
        intervals: by method and metric an interval a class.
    """
    classes = group.first.data.classes
    names = {"sensitivity": "Sensitivity", "auroc": "AUROC", "aupr": "AUPR", "f1": "F1"}
    pictures = []
    for metric, title in names.items():
        height = 0.75 + len(classes) * (0.14 * len(group.measured) + 0.16)
        height += legend_height([one.method.name for one in group.measured])
        with panel(height=min(9.0, height)) as (figure, axes):
            thick = 0.8 / len(group.measured)
            for number, one in enumerate(group.measured):
                values = class_values(one, fraction, metric)
                place = np.arange(len(classes)) - 0.4 + thick * (number + 0.5)
                style = look[one.method.name]
                axes.barh(place, values, height=thick * 0.9, color=style.colour, label=one.method.name)
                known = intervals.get(one.method.name, {}).get(metric)
                if known is not None:
                    low, high = np.array(known).T
                    axes.hlines(place, low, high, color="#111111", lw=1.1)
            axes.set_yticks(range(len(classes)), [shortened(name, 18) for name in classes])
            axes.set(xlim=(0, 1.02), ylim=(len(classes) - 0.5, -0.5), title=title)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            legend_below(figure, axes)
            pictures.append(
                finished(
                    figure,
                    f"{stem}-class-{metric}",
                    caption=f"{title} of each class, against all others"
                    + ("" if metric != "sensitivity" else "; the share of its images that are called so"),
                    alt=f"Bars of {title} by class and method: " + _bar_words(group, fraction, metric, classes),
                    choice=title,
                )
            )
    return pictures


def class_values(one: Measured, fraction: float, metric: str) -> list[float]:
    """Mean over units, a value a class."""
    units = units_at(one.evaluation, fraction)
    return np.mean([[getattr(part, metric) for part in unit.metrics.per_class] for unit in units], axis=0).tolist()


def _bar_words(group: Group, fraction: float, metric: str, classes: Sequence[str]) -> str:
    best = [class_values(one, fraction, metric) for one in group.measured]
    low = [min(range(len(classes)), key=values.__getitem__) for values in best]
    return "; ".join(
        f"{one.method.name} is lowest for {classes[k]} ({values[k]:.2f})"
        for one, values, k in zip(group.measured, best, low, strict=True)
    )


def reliability(one: Measured, fraction: float) -> tuple[Curve, Curve, Curve, Curve]:
    """Bins of all units together: edges' low and width, mean confidence, accuracy, n; NaN for an empty bin."""
    units = units_at(one.evaluation, fraction)
    bins = [unit.metrics.calibration for unit in units]
    n = np.array([[each.n for each in some] for some in bins], np.float64)
    sums = [
        np.nansum([[(getattr(each, key) or 0.0) * each.n for each in some] for some in bins], axis=0)
        for key in ("confidence", "accuracy")
    ]
    total = n.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.array([each.low for each in bins[0]]), sums[0] / total, sums[1] / total, total


def calibration_pictures(group: Group, fraction: float, look: Mapping[str, Look], stem: str) -> list[Picture]:
    """A reliability diagram a method, the images of each bin below it."""
    pictures = []
    for number, one in enumerate(group.measured):
        low, confidence, accuracy, n = reliability(one, fraction)
        width = float(np.diff(low).mean()) if len(low) > 1 else 1.0
        ece = summary_at(one.evaluation, fraction).mean["ece"]
        style = look[one.method.name]
        with canvas(3.0, 3.1) as figure:
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            axes.plot([0, 1], [0, 1], color="#b6bec4", lw=0.9, ls=(0, (2, 2)))
            filled = n > 0
            axes.bar(low[filled], accuracy[filled], width, align="edge", color=style.colour, alpha=0.28, lw=0)
            axes.plot(confidence[filled], accuracy[filled], color=style.colour, marker="o", ms=3.5, lw=1.2)
            axes.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="share called right")
            axes.set_title(f"{shortened(one.method.name, 24)}, ECE {ece:.3f}")
            below.bar(low, n / n.sum(), width, align="edge", color="#9aa4ac", lw=0)
            below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            below.set(xlabel="confidence: highest score", ylabel="images")
            pictures.append(
                finished(
                    figure,
                    f"{stem}-calibration-{number}",
                    caption=f"{one.method.name}: below the dotted line it is surer than it is right",
                    alt=f"Reliability diagram of {one.method.name}, expected calibration error {ece:.3f}",
                )
            )
    return pictures
