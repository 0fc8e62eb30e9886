"""What MLflow takes as a name and as a parameter, and the parameters of a run."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping, Sequence

from medpretrain.recipe import Recipe, flatten
from medpretrain.tracking.redaction import redact

# MLflow's own limits.
_LONGEST_PARAM = 6000
_LONGEST_KEY = 250


def recipe_params(recipe: Recipe, dataset_sha256: Sequence[str]) -> dict[str, str]:
    """A run's parameters: the resolved recipe by dotted key, its hash and those of its datasets."""
    hashes = {"recipe_sha256": recipe.sha256, "dataset_sha256": list(dataset_sha256)}
    return {key: redact(str(value)) for key, value in flatten(recipe.resolved() | hashes)}


def safe_key(name: str) -> str:
    """A name MLflow takes: letters, digits and `_-./ `, no path tricks, at most 250 characters.

    A name that had to change ends in a piece of its hash, so that no two become one.

    >>> safe_key("train/loss"), safe_key("top@5")
    ('train/loss', 'top_5-e67973')
    """
    key = re.sub(r"[^A-Za-z0-9_./ -]", "_", name)
    if not key or posixpath.normpath(key) != key or key.startswith(("/", ".")):
        key = re.sub(r"[./]", "_", key)
    if key == name and len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def split_params(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters with keys MLflow takes and no value above the length at which it cuts.

    >>> {key: len(value) for key, value in split_params({"lr": "0.1", "recipe": "x" * 6001}).items()}
    {'lr': 3, 'recipe.1': 6000, 'recipe.2': 1}
    """
    split: dict[str, str] = {}
    for name, value in params.items():
        if len(value) <= _LONGEST_PARAM:
            split[safe_key(name)] = value
            continue
        for start in range(0, len(value), _LONGEST_PARAM):
            split[safe_key(f"{name}.{start // _LONGEST_PARAM + 1}")] = value[start : start + _LONGEST_PARAM]
    return split
