"""The part of the page on what was measured: for each kind of evaluation its comparison and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from medpretrain.evaluation.imbalance import imbalance
from medpretrain.evaluation.results import Summary
from medpretrain.report.book import Book, absent, heading, paragraph
from medpretrain.report.class_intervals import RESAMPLES, class_intervals
from medpretrain.report.comparing import TESTED, Tests, notes, other_patients, trained_again
from medpretrain.report.drawing import Look
from medpretrain.report.figures_compare import efficiency_pictures, interval_picture
from medpretrain.report.figures_scores import (
    MOST_CLASSES,
    calibration_pictures,
    class_bars,
    class_values,
    confusion,
    confusion_pictures,
    curve_pictures,
    summary_at,
    units_at,
)
from medpretrain.report.gather import Group
from medpretrain.report.tables import Cell, Column, Table, integer, word
from medpretrain.report.words import METRIC_NAMES, MINUS, PROTOCOL_NAMES, TIMES, count, number, p_value, signed

_ARROWS = {"brier": " ↓", "ece": " ↓"}
_CATEGORY = {"FB": "fairly balanced", "PI": "partially imbalanced", "I": "imbalanced"}


def title(group: Group) -> str:
    first = group.first
    where = (
        first.data.name if first.data.test_name == first.data.name else f"{first.data.name} → {first.data.test_name}"
    )
    times = f", {group.pretrainings} pretrainings of each" if group.pretrainings > 1 else ""
    one = ", each pretraining by itself" if group.in_short else ""
    name = PROTOCOL_NAMES[first.protocol]
    return f"{name[0].upper()}{name[1:]} ({first.variant}) on {where}, label {first.data.label}{times}{one}"


def results_section(
    book: Book, group: Group, tests: Tests, stem: str, look: Mapping[str, Look], differs: Sequence[str]
) -> str:
    """One group: what it is, the comparison, and every figure of it."""
    fraction = group.fractions[-1]
    classes = group.first.data.classes
    parts = [heading(3, title(group), stem), paragraph(_setting(group))]
    if differs:
        parts.append(
            f'<p class="differs">Not to be compared with the other {escape(group.first.title)} evaluation on this '
            f"page, which differs in this: {escape('; '.join(differs))}.</p>"
        )
    parts.append(book.table(comparison_table(group, fraction, look, stem, tests)))
    shown = ("auroc", "aupr", "balanced_accuracy")
    parts.append(book.panels([interval_picture(group, fraction, look, stem, metric) for metric in shown]))
    if group.in_short:
        parts.append(_folded("The differences between single pretrainings", "".join(_tests(book, tests, stem))))
        parts.append(absent("The curves of these pretrainings are above, together."))
        return "".join(parts)
    parts += _tests(book, tests, stem)
    if len(group.fractions) > 1:
        parts.append(heading(4, "How much the labels matter"))
        for place, metric in enumerate(TESTED):
            table = book.table(efficiency_table(group, metric, look, stem))
            parts.append(table if not place else _folded(f"The same for {METRIC_NAMES[metric]}", table))
        parts.append(book.panels(efficiency_pictures(group, look, stem), choose="Metric", first="all"))
    at = f", with {fraction:g} % of the labels" if len(group.fractions) > 1 else ""
    parts.append(heading(4, "ROC and precision-recall curves" + at))
    drawn = [curve_pictures(group, fraction, look, kind, stem) for kind in ("roc", "pr")]
    parts.append(book.panels([pictures[0] for pictures in drawn]))
    parts.append(book.panels([one for pictures in drawn for one in pictures[1:]], kind="small", choose="Curve"))
    if len(classes) > MOST_CLASSES:
        left = ", ".join(classes[MOST_CLASSES:])
        parts.append(absent(f"Curves of {len(classes) - MOST_CLASSES} classes are left out for room: {left}."))
    parts.append(heading(4, "Confusion" + at))
    parts.append(book.panels(confusion_pictures(group, fraction, stem)))
    parts.append(_folded("Confusion as a table", book.table(confusion_table(group, fraction, look, stem))))
    parts.append(heading(4, "Class by class" + at))
    bounds = {one.method.name: class_intervals(one, fraction) for one in group.measured}
    parts.append(book.panels(class_bars(group, fraction, look, stem, bounds), choose="Metric", first="all"))
    if all(bounds.values()):
        parts.append(paragraph(f"Lines: 95 % intervals, {RESAMPLES} resamples of the patients.", "absent"))
    else:
        parts.append(absent("Too few patients have some class for an interval of single classes."))
    parts.append(_folded("Classes as a table", book.table(class_table(group, fraction, look, stem, bounds))))
    parts.append(heading(4, "Calibration" + at))
    parts.append(book.panels(calibration_pictures(group, fraction, look, stem)))
    parts.append(heading(4, "What could be learned from"))
    parts.append(book.table(imbalance_table(group, stem)))
    return "".join(parts)


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _setting(group: Group) -> str:
    first = group.first
    data = first.data
    units = units_at(first, group.fractions[-1])
    if first.folds:
        splits = f"{first.folds} folds {TIMES} {count(first.repeats, 'repeat')} of split {data.train_split}"
    else:
        splits = f"trained on split {data.train_split}, tested on split {data.test_split}"
    given = ", ".join(f"{key} {value}" for key, value in first.parameters.items() if value is not None)
    sizes = sorted({(unit.n_train, unit.n_test) for unit in units})
    train, test = (f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in _ranges(sizes))
    return (
        f"{len(data.classes)} classes; {splits}; {count(len(first.seeds), 'seed')}; {count(len(units), 'classifier')} "
        f"a method, each fitted on {train} and tested on {test} images; patients {data.patients}."
        + (" A pretraining counts by the mean over its classifiers." * (group.pretrainings > 1))
        + (f" Settings: {given}." if given else "")
    )


def _ranges(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(min(column), max(column)) for column in zip(*sizes, strict=True)]


def comparison_table(group: Group, fraction: float, look: Mapping[str, Look], stem: str, tests: Tests) -> Table:
    """A row a method, every scalar metric with its interval."""
    columns = [Column("Method", ("method",), numeric=False)]
    columns += [
        Column(METRIC_NAMES[metric] + _ARROWS.get(metric, ""), (metric, f"{metric}_low", f"{metric}_high"))
        for metric in METRIC_NAMES
    ]
    columns += [Column("n", ("n_test", "units"))]
    best = {metric: tests.best(metric) for metric in TESTED}
    rows = []
    for one in group.measured:
        summary = summary_at(one.evaluation, fraction)
        cells = [word(one.method.name, look=look[one.method.name])]
        cells += [_with_interval(summary, metric, bold=best.get(metric) == one.method.name) for metric in METRIC_NAMES]
        images = len({*one.predictions.row_R.tolist()})
        rows.append([*cells, Cell(f"{images:,}", (images, summary.units), count(summary.units, "unit"))])
    at = f", {fraction:g} % of the labels" if len(group.fractions) > 1 else ""
    bold = [METRIC_NAMES[metric] for metric, name in best.items() if name]
    said = [
        "Mean over units and, below it, its 95 % interval: bootstrap that resamples patients. n: different test "
        "images; a unit is one classifier, fitted on some patients and tested on others."
    ]
    if tests.pairs:
        said.append(
            f"Bold: better than every other method, p of 0.05 or below after Holm's correction ({', '.join(bold)})."
            if bold
            else "Nothing is bold, for no method is better than every other one with p of 0.05 or below after Holm's "
            f"correction; tested are {', '.join(METRIC_NAMES[metric] for metric in TESTED)}."
        )
    return Table(f"{stem}-comparison", f"Comparison: {title(group)}{at}", columns, rows, said)


def _tests(book: Book, tests: Tests, stem: str) -> list[str]:
    """The table of differences for the first metric, the others folded; or why there is none."""
    found = [heading(4, "Are the differences real?")]
    if not tests.pairs:
        return [*found, absent(tests.why)]
    for place, metric in enumerate(TESTED):
        table = book.table(test_table(tests, metric, stem))
        found.append(table if not place else _folded(f"The same for {METRIC_NAMES[metric]}", table))
    return found


def test_table(tests: Tests, metric: str, stem: str) -> Table:
    """A row a pair of methods."""
    columns = [
        Column("Methods", ("first", "second"), numeric=False),
        Column("Difference", ("difference", "difference_low", "difference_high")),
        Column("Pairs", ("pairs",)),
        Column("p", ("p",)),
        Column("p, Holm", ("p_holm",)),
        Column("Least p", ("least_p", "least_p_holm")),
        Column("With other patients", ("other_patients",), numeric=False),
        Column("Trained again", ("trained_again",), numeric=False),
    ]
    rows = []
    for pair in tests.of(metric):
        low, high = (pair.interval.low, pair.interval.high) if pair.interval else (None, None)
        bounds = f"{signed(pair.interval.low)} to {signed(pair.interval.high)}" if pair.interval else "no interval"
        rows.append(
            [
                Cell(f"{pair.first} {MINUS} {pair.second}", (pair.first, pair.second)),
                Cell(signed(pair.difference), (pair.difference, low, high), bounds),
                integer(pair.pairs),
                Cell(p_value(pair.p), (pair.p,)),
                Cell(p_value(pair.p_holm), (pair.p_holm,), bold=pair.significant),
                Cell(p_value(pair.least_p), (pair.least_p, pair.least_p_holm), p_value(pair.least_p_holm)),
                word(other_patients(pair)),
                word(trained_again(pair)),
            ]
        )
    caption = f"Differences in {METRIC_NAMES[metric]} between methods"
    return Table(f"{stem}-tests-{metric.replace('_', '-')}", caption, columns, rows, notes(tests, metric))


def efficiency_table(group: Group, metric: str, look: Mapping[str, Look], stem: str) -> Table:
    """A row a method, a column a fraction."""
    columns = [Column("Method", ("method",), numeric=False)]
    for fraction in group.fractions:
        name = f"{metric}_{fraction:g}"
        columns.append(Column(f"{fraction:g} %", (name, f"{name}_low", f"{name}_high")))
    rows = []
    for one in group.measured:
        found = [summary_at(one.evaluation, fraction) for fraction in group.fractions]
        rows.append(
            [word(one.method.name, look=look[one.method.name]), *(_with_interval(each, metric) for each in found)]
        )
    sizes = {fraction: sorted(unit.n_train for unit in units_at(group.first, fraction)) for fraction in group.fractions}
    images = [
        f"{fraction:g} %: {of[0]:,}" + (f" to {of[-1]:,}" if of[-1] != of[0] else "") for fraction, of in sizes.items()
    ]
    caption = f"{METRIC_NAMES[metric]} over the share of labelled training patients"
    said = [f"Training images of a classifier: {', '.join(images)}."]
    return Table(f"{stem}-labels-{metric.replace('_', '-')}", caption, columns, rows, said)


def _with_interval(summary: Summary, metric: str, bold: bool = False) -> Cell:
    interval = summary.interval.get(metric)
    bounds = (interval.low, interval.high) if interval else (None, None)
    small = f"{number(interval.low)} to {number(interval.high)}" if interval else "no interval"
    return Cell(number(summary.mean[metric]), (summary.mean[metric], *bounds), small, bold=bold)


def confusion_table(group: Group, fraction: float, look: Mapping[str, Look], stem: str) -> Table:
    """A row a method and true class."""
    classes = group.first.data.classes
    columns = [Column("Method", ("method",), numeric=False), Column("True class", ("true",), numeric=False)]
    columns += [Column(f"called {name}", (f"count {name}", f"share {name}")) for name in classes]
    rows = []
    for one in group.measured:
        for name, counts in zip(classes, confusion(one, fraction).tolist(), strict=True):
            shares = [value / sum(counts) for value in counts]
            cells = [
                Cell(f"{value:,}", (value, share), f"{100 * share:.1f} %")
                for value, share in zip(counts, shares, strict=True)
            ]
            rows.append([word(one.method.name, look=look[one.method.name]), word(name), *cells])
    return Table(f"{stem}-confusion", "Images of each true class by what they were called", columns, rows)


def class_table(
    group: Group,
    fraction: float,
    look: Mapping[str, Look],
    stem: str,
    bounds: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> Table:
    """A row a method and class."""
    shown = {"sensitivity": "Sensitivity", "specificity": "Specificity", "auroc": "AUROC", "aupr": "AUPR", "f1": "F1"}
    columns = [Column("Method", ("method",), numeric=False), Column("Class", ("class",), numeric=False)]
    columns += [Column("Test images", ("n",))]
    columns += [Column(name, (metric, f"{metric}_low", f"{metric}_high")) for metric, name in shown.items()]
    rows = []
    for one in group.measured:
        values = {metric: class_values(one, fraction, metric) for metric in shown}
        for k, name in enumerate(group.first.data.classes):
            cells = []
            for metric in shown:
                known = bounds[one.method.name].get(metric)
                low, high = known[k] if known else (None, None)
                small = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
                cells.append(Cell(number(values[metric][k]), (values[metric][k], low, high), small))
            counted = integer(group.first.data.test_counts[k])
            rows.append([word(one.method.name, look=look[one.method.name]), word(name), counted, *cells])
    return Table(f"{stem}-classes", "Every class against all others", columns, rows)


def imbalance_table(group: Group, stem: str) -> Table:
    """Training images of each class, and how uneven they are."""
    data = group.first.data
    found = imbalance(data.train_counts, data.classes)
    counts = dict(zip(data.classes, data.train_counts, strict=True))
    rarest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    columns = [
        Column("Data", ("dataset",), numeric=False),
        Column("Images", ("images",)),
        Column("Rarest class", ("rarest", "rarest_images"), numeric=False),
        Column("Largest class", ("largest", "largest_images"), numeric=False),
        Column("IR", ("imbalance_ratio",)),
        Column("CV", ("coefficient_of_variation",)),
        Column("NE", ("normalized_entropy",)),
        Column("Gini", ("gini",)),
        Column("RCR, %", ("rare_class_ratio",)),
        Column("Class", ("category",), numeric=False),
    ]
    measures = (found.imbalance_ratio, found.coefficient_of_variation, found.normalized_entropy, found.gini)
    row = [
        Cell(data.name, (data.name,)),
        integer(sum(data.train_counts)),
        Cell(rarest, (rarest, counts[rarest]), f"{counts[rarest]:,}"),
        Cell(largest, (largest, counts[largest]), f"{counts[largest]:,}"),
        *(Cell(f"{value:.2f}", (value,)) for value in (*measures, found.rare_class_ratio)),
        Cell(found.category, (found.category,), _CATEGORY[found.category]),
    ]
    notes = [
        "IR: largest / smallest class; CV: coefficient of variation; NE: normalised entropy, 1 for equal classes; RCR: "
        "share of the rarest class.",
        "Training images by class: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()) + ".",
    ]
    return Table(f"{stem}-imbalance", "Imbalance of the images that could be learned from", columns, [row], notes)
