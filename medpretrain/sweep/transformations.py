"""The transformations that a recipe's views have on, and the overrides that leave only some of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args

from data_prep.errors import UserError
from medpretrain.data.views import Augmentation, View
from medpretrain.recipe import Recipe

Transformation = Literal["crop", "flip", "quarter_turns", "jitter", "grayscale", "blur", "noise", "bias_field"]
ALL: tuple[Transformation, ...] = get_args(Transformation)

_OFF = {name: Augmentation.model_fields[name].default for name in ALL}


def switched_on(recipe: Recipe) -> tuple[Transformation, ...]:
    """Those that any view of the recipe has on."""
    there = {name for _, view in _augmentations(recipe) for name in _on(view)}
    return tuple(name for name in ALL if name in there)


def asked_for(recipe: Recipe, names: Collection[Transformation]) -> tuple[Transformation, ...]:
    """`names`, or all that the recipe has on.

    Raises:
        UserError: one that the recipe does not have on, or stands twice; fewer than one.
    """
    there = switched_on(recipe)
    for name in names:
        if name not in there:
            raise UserError(
                f"recipe {recipe.name} has {', '.join(there) or 'no transformation'} on, and not {name!r}; give "
                f"its strength in the overrides, as in views.KIND.{name}=..."
            )
    if len(set(names)) < len(names):
        raise UserError("a transformation stands twice in transformations")
    if not there:
        raise UserError(f"recipe {recipe.name} has no transformation on, so none can be left out or paired")
    return tuple(names) or there


def without(recipe: Recipe, removed: Collection[Transformation]) -> list[str]:
    """The overrides that switch transformations off in every view."""
    return [
        f"{place}.{name}={json.dumps(_OFF[name])}"
        for place, view in _augmentations(recipe)
        for name in _on(view)
        if name in removed
    ]


def together(recipe: Recipe, kept: Collection[Transformation]) -> list[str]:
    """The overrides that leave in every view no transformation but some."""
    return without(recipe, [name for name in ALL if name not in kept])


def apart(recipe: Recipe, first: Transformation, second: Transformation) -> list[str]:
    """The overrides that leave on the first view only `first`, and on the second only `second`.

    Raises:
        UserError: the recipe has a kind of view with another number of views than two.
    """
    overrides = []
    for kind, view in recipe.views.items():
        if view.count != 2:
            raise UserError(
                f"recipe {recipe.name} has views.{kind}.count={view.count}; a pair, one on the first view and one on "
                "the second, needs two: take pairs.how: together"
            )
        overrides += [f"views.{kind}.{name}={json.dumps(_OFF[name])}" for name in _on(view) if name != first]
        if first not in _on(view):
            overrides += [f"views.{kind}.{key}={json.dumps(value)}" for key, value in _strength(view, first).items()]
        overrides.append(f"views.{kind}.second={json.dumps(_strength(view, second))}")
    return overrides


def _strength(view: View, name: Transformation) -> dict[str, Any]:
    """What a transformation is in a kind of view, by field: of the first view, or of the second where only that has
    it; nothing where neither has."""
    for one in (view, view.second):
        if one is not None and name in _on(one):
            values = one.model_dump(mode="json")
            return {key: values[key] for key in ((name, "ratio") if name == "crop" else (name,))}
    return {}


def _augmentations(recipe: Recipe) -> Iterator[tuple[str, Augmentation]]:
    """Each with the dotted key where it stands."""
    for kind, view in recipe.views.items():
        yield f"views.{kind}", view
        if view.second is not None:
            yield f"views.{kind}.second", view.second


def _on(view: Augmentation) -> list[Transformation]:
    return [name for name in ALL if getattr(view, name) != _OFF[name]]
