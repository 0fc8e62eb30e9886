"""From a recipe's name or file, and overrides, to a checked recipe; errors say file, line and the nearest name."""

from __future__ import annotations

import io
import json
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from data_prep.errors import UserError, nearest
from medpretrain.recipe import Recipe

_log = logging.getLogger(__name__)

Location = tuple[str | int, ...]


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
    path = _find(name)
    data = _read_yaml(path)
    lines = _line_numbers(data)
    overridden: set[Location] = set()
    for override in overrides:
        overridden.add(_set(data, override))
    try:
        # JSON mode is strict about types and still takes a list for a tuple.
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error, Recipe, path, lines, overridden)) from None
    return _with_checked_method(recipe, path, lines, overridden)


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


def _read_yaml(path: Path) -> CommentedMap:
    try:
        data = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}:{line}: not YAML: {error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, CommentedMap):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return data


def _line_numbers(data: Any, at: Location = ()) -> dict[Location, int]:
    """The line, from 1, of every key and list item."""
    lines: dict[Location, int] = {}
    keys: Any = data.keys() if isinstance(data, CommentedMap) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        lines[(*at, key)] = data.lc.data[key][0] + 1
        lines.update(_line_numbers(data[key], (*at, key)))
    return lines


def _set(data: CommentedMap, override: str) -> Location:
    key, equals, text = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise UserError(f"an override reads key=value, as in optim.lr=3e-4, not {override!r}")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML") from None
    parent: Any = data
    for part in parts[:-1]:
        if not isinstance(parent, dict):
            raise UserError(f"override {override!r}: {part!r} is inside a value that has no keys")
        parent = parent.setdefault(part, {})
    if not isinstance(parent, dict):
        raise UserError(f"override {override!r}: {'.'.join(parts[:-1])} is not a section")
    parent[parts[-1]] = value
    other = {"train.steps": "epochs", "train.epochs": "steps"}.get(key)
    if other:
        parent.pop(other, None)
    return parts


def _with_checked_method(
    recipe: Recipe, path: Path, lines: Mapping[Location, int], overridden: set[Location]
) -> Recipe:
    """The recipe with the method's options checked and spelled out, and views that the method knows.

    A method's options stand in its own file, which imports torch; without torch only the method's name is checked, and
    training checks the rest.
    """
    from medpretrain.methods import METHODS, method_class

    def refuse(location: Location, problem: str) -> UserError:
        return UserError(f"{_where(location, path, lines, overridden)}: {problem}")

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
    try:
        options = method.options.model_validate_json(json.dumps(recipe.method), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error, method.options, path, lines, overridden, under=("method",))) from None
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


def _explain(
    error: ValidationError,
    model: type[BaseModel],
    path: Path,
    lines: Mapping[Location, int],
    overridden: set[Location],
    under: Location = (),
) -> str:
    """The first problem pydantic found, in one line."""
    first = error.errors()[0]
    location = first["loc"]
    where = _where((*under, *location), path, lines, overridden)
    key = str(location[-1]) if location else ""
    if first["type"] == "extra_forbidden":
        choices = _fields_at(model, location[:-1])
        return f"{where}: unknown key {key!r}{nearest(key, choices)}"
    if first["type"] == "missing":
        return f"{where}: the key {'.'.join(map(str, (*under, *location)))} is missing"
    problem = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    key = ".".join(map(str, (*under, *location)))
    return f"{where}: {problem}{shown}" if where == f"override {key}" else f"{where}: {key}: {problem}{shown}"


def _where(location: Location, path: Path, lines: Mapping[Location, int], overridden: set[Location]) -> str:
    """The override or the nearest line that a location stems from."""
    for end in range(len(location), 0, -1):
        if location[:end] in overridden:
            return f"override {'.'.join(map(str, location[:end]))}"
        if location[:end] in lines:
            return f"{path}:{lines[location[:end]]}"
    return str(path)


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """The keys that may stand at a place of a model."""
    here: Any = model
    for part in location:
        if typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        elif isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation
        if typing.get_origin(here) in (typing.Union, types.UnionType):
            here = next(one for one in typing.get_args(here) if one is not types.NoneType)
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []
