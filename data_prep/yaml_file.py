"""Small strict YAML files: a mapping, read with the line of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from data_prep.errors import UserError


def read_mapping(path: Path) -> CommentedMap:
    """The mapping in a file.

    Raises:
        UserError: no file, not UTF-8, not YAML, a key twice, or no mapping; with file and line.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        content = YAML(typ="rt").load(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", None) or "no valid YAML").splitlines()[0]
        raise UserError(f"{path}{line}: {problem}") from None
    if not isinstance(content, CommentedMap) or not content:
        raise UserError(f"{path}: must be a mapping of keys to values")
    return content


def place(path: Path, parent: Any, key: Any) -> str:
    """File and line of a key of a mapping or an item of a list, to open a message with."""
    return f"{path}, line {parent.lc.data[key][0] + 1}"
