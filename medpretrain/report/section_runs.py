"""The parts of the page on pretraining: curves, views, recipes and what they ran with."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from medpretrain.recipe import Recipe
from medpretrain.recipe_file import dump_recipe
from medpretrain.report.book import Book, absent, card, heading, paragraph, strip
from medpretrain.report.drawing import Look
from medpretrain.report.figures_runs import run_pictures
from medpretrain.report.gather import Run
from medpretrain.report.tables import Cell, Column, Table, word
from medpretrain.report.views import Reach, sample_views
from medpretrain.report.words import TIMES, count

if TYPE_CHECKING:
    from medpretrain.data.mixture import Mixture

HIDDEN = "left out of this page"
# What a version table shows of environment.txt.
_PACKAGES = ("medpretrain", "torch", "torchvision", "timm", "nvidia-dali-cuda130", "numpy", "scikit-learn", "deepspeed")


def without_places(recipe: Recipe) -> Recipe:
    """The recipe without paths, URLs and host names: folders keep their last name."""
    data = recipe.data.model_copy(update={"path": tuple(PurePath(path).name for path in recipe.data.path)})
    return recipe.model_copy(
        update={
            "data": data,
            "run": recipe.run.model_copy(update={"dir": None}),
            "checkpoint": recipe.checkpoint.model_copy(update={"to": recipe.checkpoint.to and HIDDEN}),
            "tracking": recipe.tracking.model_copy(update={"uri": recipe.tracking.uri and HIDDEN}),
        }
    )


def training_section(book: Book, runs: Sequence[Run], reach: Reach, look: Mapping[str, Look]) -> str:
    """Curves, and views."""
    if not runs:
        return absent("None of the folders is a run: there are no training curves and no recipes to show.")
    parts = [book.panels(run_pictures(runs, look), choose="Metric", first="all")]
    silent = [run.name for run in runs if not run.rows]
    if silent:
        parts.append(absent(f"No training metrics were found of {', '.join(silent)}."))
    parts.append(heading(3, "Training images as the model saw them", "views"))
    if not book.images:
        return "".join([*parts, absent("Left out: this report is without images of patients.")])
    cards, without = [], []
    for run in runs:
        found = _views(book, run, reach[run.name])
        if isinstance(found, str):
            without.append(absent(f"{run.name}: no views, for {found}."))
        else:
            cards.append(card(run.name, look[run.name], found))
    if cards:
        parts.append(
            absent("The first images of the first batch: a row a view, a column an image, the same image in every row.")
        )
        parts.append(f'<div class="strips">{"".join(cards)}</div>')
    return "".join([*parts, *without])


def _views(book: Book, run: Run, mixture: Mixture | str) -> list[str] | str:
    """A strip an image, or why there are none."""
    samples = mixture if isinstance(mixture, str) else sample_views(run, mixture)
    if isinstance(samples, str):
        return samples
    strips = []
    for place, (name, _) in enumerate(samples[0].views):
        figures = []
        for sample in samples:
            of = ", ".join(sample.labels)
            alt = f"view {name} of {of or 'an image'}"
            figures.append(book.thumbnail(sample.views[place][1], alt, f"{name}{': ' if of else ''}{of}"))
        strips.append(strip(figures, f"{run.name}: view {name} of the first training images"))
    return strips


def recipes_section(book: Book, runs: Sequence[Run], look: Mapping[str, Look]) -> str:
    """What each run was told, where they differ, and what it ran with."""
    if not runs:
        return absent("None of the folders is a run: there is no recipe.")
    parts = []
    if len(runs) > 1:
        parts += [heading(3, "Where the recipes differ"), _differences(book, runs)]
    parts.append(heading(3, "Recipes"))
    for run in runs:
        text = dump_recipe(without_places(run.recipe))
        parts.append(
            f"<details><summary>{escape(run.name)}: recipe {escape(run.recipe.name)}, "
            f"<code>{run.recipe.sha256[:16]}</code></summary><pre>{escape(text)}</pre></details>"
        )
    parts += [heading(3, "Versions"), book.table(versions_table(runs, look))]
    parts.append(paragraph("Paths, hosts, command lines and addresses are left out of this page."))
    return "".join(parts)


def recipe_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By dotted key, or by a part of the recipe that not every run has, what each run says, where not all say the same.

    Only what decides what is trained; lists are kept whole.
    """
    flat = [_identity(run.recipe) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found: dict[str, list[str]] = {}
    for key in keys:
        if all(key in one for one in flat):
            found[key] = [_shown(one[key]) for one in flat]
        else:
            part = ".".join(key.split(".")[:2]) if key.startswith("views.") else key.split(".")[0]
            found[part if part.startswith("views.") else f"{part}, its own options"] = [
                _own(one, part, flat) for one in flat
            ]
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _own(one: Mapping[str, Any], part: str, flat: Sequence[Mapping[str, Any]]) -> str:
    """What one recipe says in a part where not all have the same keys; what is off is left out."""
    keys = [key for key in one if key.startswith(f"{part}.") and not all(key in other for other in flat)]
    said = [f"{key.removeprefix(f'{part}.')} {_shown(one[key])}" for key in keys if one[key] not in (None, 0.0, [])]
    return ", ".join(said) or "none"


def _identity(recipe: Recipe) -> dict[str, Any]:
    """As `Recipe.identity`, lists kept whole."""
    deciding = recipe.identity().keys()
    kept = {re.sub(r"(\.\d+)+$", "", key) for key in deciding}
    return {key: value for key, value in _leaves(recipe.resolved()) if key in kept}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inside in value.items():
            yield from _leaves(inside, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _differences(book: Book, runs: Sequence[Run]) -> str:
    found = {key: values for key, values in recipe_differences(runs).items() if key != "name"}
    if not found:
        return absent("The recipes do not differ in anything that decides what is trained.")
    columns = [Column("Key", ("key",), numeric=False), *(Column(run.name, (run.name,), numeric=False) for run in runs)]
    rows = []
    for key, values in found.items():
        common = max(values, key=values.count)
        majority = len(runs) > 2 and values.count(common) > 1
        cells = [Cell(value, (value,), bold=majority and value != common) for value in values]
        rows.append([word(key), *cells])
    notes = ["Bold: unlike most. Keys that are not here are the same in all."]
    caption = f"{count(len(rows), 'part')} of the recipes that {'is' if len(rows) == 1 else 'are'} not the same"
    return book.table(Table("recipe-differences", caption, columns, rows, notes))


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def versions_table(runs: Sequence[Run], look: Mapping[str, Look]) -> Table:
    """What each run's last start ran with."""
    columns = [Column("Run", ("run",), numeric=False)]
    columns += [Column(title, (name,), numeric=False) for title, name in _VERSION_COLUMNS]
    rows = []
    for run in runs:
        last = run.starts[-1] if run.starts else {}
        git = last.get("git") or {}
        commit = f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git else "unknown"
        versions = ", ".join(line for line in run.environment if line.partition("==")[0] in _PACKAGES)
        machine = "; ".join(
            line[2:] for line in run.environment if line.startswith(("# python", "# CUDA", "# GPU", "# no"))
        )
        started = time.strftime("%Y-%m-%d", time.gmtime(last["time"])) if last else "unknown"
        steps = str(run.rows[-1]["step"]) if run.rows else "unknown"
        world = f"{last['world_size']} {TIMES} {last['strategy']}" if last else "unknown"
        said = (steps, started, str(len(run.starts)), world, commit, machine or "unknown", versions or "unknown")
        rows.append([word(run.name, look=look[run.name]), *map(word, said)])
    return Table("versions", "What each run ran with, at its last start", columns, rows)


_VERSION_COLUMNS = (
    ("Steps", "steps"),
    ("Started", "started"),
    ("Starts", "starts"),
    ("Processes", "processes"),
    ("Commit", "commit"),
    ("Machine", "machine"),
    ("Packages", "packages"),
)
