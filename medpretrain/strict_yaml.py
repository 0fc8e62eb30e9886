"""YAML files that a pydantic model is strict about: every error names file, line and the nearest name."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from data_prep.errors import UserError, nearest
from launchers.passwords import without_passwords

Location = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class Document:
    """The mapping in a YAML file, and what is overridden in it.

    Args:
        what: what the file holds, for an error: "a recipe".

    Raises:
        UserError: not YAML, or no mapping.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        try:
            data = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise UserError(f"{path}:{line}: not YAML: {error.problem}") from None
        except (YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not YAML: {error}") from None
        if not isinstance(data, CommentedMap):
            raise UserError(f"{path}: {what} is a mapping of keys to values")
        self.data = data
        self._lines = _line_numbers(data)
        self._overridden: set[Location] = set()

    def set(self, override: str) -> str:
        """Set `key=value`, the value in YAML; gives the key.

        Raises:
            UserError: it does not read so, or the key is inside a value.
        """
        key, equals, text = override.partition("=")
        parts = tuple(key.split("."))
        if not equals or not all(parts):
            raise UserError(f"an override reads key=value, as in optim.lr=3e-4, not {override!r}")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            raise UserError(f"override {override!r}: the value is not YAML") from None
        parent: Any = self.data
        for part in parts[:-1]:
            if not isinstance(parent, dict):
                raise UserError(f"override {override!r}: {part!r} is inside a value that has no keys")
            parent = parent.setdefault(part, {})
        if not isinstance(parent, dict):
            raise UserError(f"override {override!r}: {'.'.join(parts[:-1])} is not a section")
        parent[parts[-1]] = value
        self._overridden.add(parts)
        return key

    def drop(self, key: str) -> None:
        """Leave out a dotted key, if it is there."""
        *parents, last = key.split(".")
        parent: Any = self.data
        for part in parents:
            parent = parent.get(part, {})
        parent.pop(last, None)

    def checked(self, model: type[Model]) -> Model:
        """The document as a `model`.

        Raises:
            UserError: an unknown key, a wrong type or a value out of range, naming where.
        """
        return self.part(self.data, model)

    def part(self, data: Any, model: type[Model], under: Location = ()) -> Model:
        """What stands `under` a place of the document, as a `model`.

        Raises:
            UserError: see `checked`.
        """
        try:
            # JSON mode is strict about types and still takes a list for a tuple.
            return model.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise UserError(self._explain(error, model, under)) from None

    def refusal(self, location: Location, problem: str) -> UserError:
        """The error for a problem of one place."""
        return UserError(f"{self._where(location)}: {problem}")

    def _explain(self, error: ValidationError, model: type[BaseModel], under: Location) -> str:
        """The first problem pydantic found, in one line."""
        first = error.errors()[0]
        location = first["loc"]
        where = self._where((*under, *location))
        key = str(location[-1]) if location else ""
        if first["type"] == "extra_forbidden":
            choices = _fields_at(model, location[:-1])
            return f"{where}: unknown key {key!r}{nearest(key, choices)}"
        if first["type"] == "missing":
            return f"{where}: the key {'.'.join(map(str, (*under, *location)))} is missing"
        problem = first["msg"].removeprefix("Value error, ")
        given = first["input"]
        shown = "" if isinstance(given, dict) else f" (given: {without_passwords(repr(given))})"
        key = ".".join(map(str, (*under, *location)))
        return f"{where}: {problem}{shown}" if where == f"override {key}" else f"{where}: {key}: {problem}{shown}"

    def _where(self, location: Location) -> str:
        """The override or the nearest line that a location stems from."""
        for end in range(len(location), 0, -1):
            if location[:end] in self._overridden:
                return f"override {'.'.join(map(str, location[:end]))}"
            if location[:end] in self._lines:
                return f"{self.path}:{self._lines[location[:end]]}"
        return str(self.path)


def _line_numbers(data: Any, at: Location = ()) -> dict[Location, int]:
    """The line, from 1, of every key and list item."""
    lines: dict[Location, int] = {}
    keys: Any = data.keys() if isinstance(data, CommentedMap) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        lines[(*at, key)] = data.lc.data[key][0] + 1
        lines.update(_line_numbers(data[key], (*at, key)))
    return lines


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """The keys that may stand at a place of a model."""
    here: Any = model
    for part in location:
        if typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        elif typing.get_origin(here) is tuple:
            here = typing.get_args(here)[0]
        elif isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation
        if typing.get_origin(here) in (typing.Union, types.UnionType):
            here = next(one for one in typing.get_args(here) if one is not types.NoneType)
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []
