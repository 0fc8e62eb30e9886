"""From a recipe's name or file, and overrides, to a checked recipe; errors say file, line and the nearest name."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

from data_prep.errors import UserError, nearest
from medpretrain.recipe import Recipe
from medpretrain.strict_yaml import Document

_log = logging.getLogger(__name__)

_EXCLUSIVE = {"train.steps": "train.epochs", "train.epochs": "train.steps"}


def recipes_folder() -> Path:
    """`configs/`: beside the packages in a checkout, inside this one in a wheel."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe or a YAML file, with `key=value` overrides.

    Args:
        name: a shipped recipe's name, or a path that ends in .yaml or .yml.
        overrides: dotted keys, values in YAML: `optim.lr=3e-4`, `views.global.crop=[0.5, 1]`. Setting train.steps
            takes the place of train.epochs, and the other way round.

    Raises:
        UserError: no such recipe; not YAML; an unknown key, a wrong type or a value out of range, naming where.
    """
    document = Document(_find(name), "a recipe")
    for override in overrides:
        key = document.set(override)
        if key in _EXCLUSIVE:
            document.drop(_EXCLUSIVE[key])
    return _with_checked_method(document.checked(Recipe), document)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back to an equal one."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    yaml.dump(recipe.resolved(), text)
    return text.getvalue()


def read_recipe(text: str) -> Recipe:
    """What `dump_recipe` wrote."""
    return Recipe.model_validate_json(json.dumps(YAML(typ="safe", pure=True).load(text)), strict=True)


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"there is no recipe file {name}")
        return Path(name)
    shipped = recipe_files()
    if name not in shipped:
        raise UserError(f"there is no recipe {name!r}{nearest(name, shipped)}; `medpretrain recipes` lists them")
    return shipped[name]


def _with_checked_method(recipe: Recipe, document: Document) -> Recipe:
    """The recipe with the method's options checked and spelled out, and views that the method knows.

    A method's options stand in its own file, which imports torch; without torch only the method's name is checked, and
    training checks the rest.
    """
    from medpretrain.methods import METHODS, method_class

    refuse = document.refusal
    name = recipe.method.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise refuse(("method", "name"), f"there is no method {name!r}{nearest(str(name), METHODS)}")
    try:
        method = method_class(name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        _say_what_is_unchecked()
        return recipe
    options = document.part(recipe.method, method.options, under=("method",))
    for view in recipe.views:
        if view not in method.view_kinds:
            raise refuse(("views", view), f"method {name} has no view {view!r}{nearest(view, method.view_kinds)}")
    for view, least in method.view_kinds.items():
        if least and view not in recipe.views:
            raise refuse(("views",), f"method {name} needs the view {view!r}")
        if least and recipe.views[view].count < least:
            raise refuse(("views", view, "count"), f"method {name} needs at least {least} views {view!r} of each image")
        if method.exact_views and recipe.views[view].count > least:
            raise refuse(("views", view, "count"), f"method {name} uses exactly {least} views {view!r} of each image")
    if method.labels != "none" and not recipe.data.labels:
        raise refuse(("data", "labels"), f"method {name} learns from labels; name them, as in [modality, anatomy]")
    return recipe.model_copy(update={"method": options.model_dump(mode="json")})


@cache
def _say_what_is_unchecked() -> None:
    _log.warning("torch is not installed here: a method's options and views are checked where training starts")
