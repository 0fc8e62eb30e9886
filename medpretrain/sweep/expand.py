"""From a sweep to its runs: a pure function, and each run is an ordinary recipe with overrides."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from launchers.passwords import refuse_password
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import load_recipe
from medpretrain.sweep import transformations
from medpretrain.sweep.sweep_file import PLACE, Axis, Sweep, Value

RECIPE, SEED = "recipe", "seed"
"""Axes that a sweep has beside its own where there are several recipes, or seeds."""
REMOVED, NOTHING = "removed", "nothing"
FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        number: its place, from 0.
        name: of its folder.
        recipe: name or file.
        overrides: all that is set in it, but for where it lies.
        axes: what is varied, and its value here.
        resolved: the recipe as it will be trained.
    """

    number: int
    name: str
    recipe: str
    overrides: tuple[str, ...]
    axes: Mapping[str, Value]
    resolved: Recipe = field(repr=False)


@dataclass(frozen=True)
class _Point:
    """One choice: what is said of it, what it adds to the run's name, and its overrides."""

    axes: Mapping[str, Value]
    word: str
    overrides: Sequence[str]


def expand(sweep: Sweep, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """All runs of a sweep, each checked.

    Args:
        overrides: of every run, after the sweep's own.

    Raises:
        UserError: a recipe that cannot be read, naming the values of the axes where it is one of a run; two runs of one
            name; a password in an override.
    """
    common = (*sweep.overrides, *overrides)
    for override in common:
        refuse_password(override)
    runs: list[SweepRun] = []
    for recipe in sweep.recipe:
        base = _loaded(f"sweep {sweep.name}", recipe, common)
        several = _Point({RECIPE: base.name}, base.name, ())
        of_recipe = [[several]] if len(sweep.recipe) > 1 else []
        of_seed = (
            [[_Point({SEED: seed}, f"seed-{seed}", [f"seed={seed}"]) for seed in sweep.seeds]] if sweep.seeds else []
        )
        for points in itertools.product(*of_recipe, *_choices(sweep, base), *of_seed):
            axes = {name: value for point in points for name, value in point.axes.items()}
            name = "-".join(point.word for point in points)
            set_here = (*common, *(override for point in points for override in point.overrides))
            named = (*set_here, f"name={sweep.name}-{name}")
            said = ", ".join(f"{axis} {value}" for axis, value in axes.items())
            resolved = _loaded(f"sweep {sweep.name}, {said}", recipe, named)
            runs.append(SweepRun(len(runs), name, recipe, named, axes, resolved))
    _refuse_same_names(sweep, runs)
    return runs


def words(run: SweepRun, folder: Path) -> list[str]:
    """The recipe and overrides that train a run in a folder, for `medpretrain train`."""
    plain = re.fullmatch(r"[\w./-]+/[\w./-]+", str(folder))  # which YAML takes for nothing but a text
    return [run.recipe, *run.overrides, f"run.dir={folder if plain else json.dumps(str(folder))}"]


def _loaded(who: str, recipe: str, overrides: Sequence[str]) -> Recipe:
    try:
        return load_recipe(recipe, overrides)
    except UserError as error:
        raise UserError(f"{who}: {error}") from None


def _choices(sweep: Sweep, base: Recipe) -> list[list[_Point]]:
    """For each axis of the sweep its points."""
    if sweep.pairs is not None:
        names = transformations.asked_for(base, sweep.pairs.transformations)
        return [list(_pairs(base, names, apart=sweep.pairs.how == "apart"))]
    if sweep.leave_one_out is not None:
        names = transformations.asked_for(base, sweep.leave_one_out.transformations)
        removed = [_Point({REMOVED: name}, f"no-{name}", transformations.without(base, [name])) for name in names]
        return [[_Point({REMOVED: NOTHING}, "full", ()), *removed]]
    return [_values(axis) for axis in sweep.grid]


def _pairs(base: Recipe, names: Sequence[transformations.Transformation], *, apart: bool) -> Iterator[_Point]:
    if apart:
        for first, second in itertools.product(names, repeat=2):
            yield _Point(
                {FIRST: first, SECOND: second}, f"{first}-{second}", transformations.apart(base, first, second)
            )
        return
    for first, second in itertools.combinations_with_replacement(names, 2):
        word = first if first == second else f"{first}-{second}"
        yield _Point({FIRST: first, SECOND: second}, word, transformations.together(base, {first, second}))


def _values(axis: Axis) -> list[_Point]:
    title = _word(axis.name)
    if axis.cases:
        return [_Point({axis.name: name}, f"{title}-{name}", overrides) for name, overrides in axis.cases.items()]
    points = []
    for value in axis.values:
        text = value if isinstance(value, str) else json.dumps(value)
        overrides = [override.replace(PLACE, text) for override in axis.set]
        points.append(_Point({axis.name: value}, f"{title}-{_word(text)}", overrides))
    return points


def _word(text: str) -> str:
    """A text as part of a folder's name.

    >>> _word("batch size"), _word("1e-3")
    ('batch-size', '1e-3')
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-") or "value"


def _refuse_same_names(sweep: Sweep, runs: Sequence[SweepRun]) -> None:
    seen: dict[str, SweepRun] = {}
    for run in runs:
        other = seen.setdefault(run.name.lower(), run)  # some file systems do not tell cases apart
        if other is not run:
            raise UserError(
                f"sweep {sweep.name}: two runs would both be called {run.name!r} (of {other.axes} and {run.axes}); "
                "change an axis's name or a value"
            )
