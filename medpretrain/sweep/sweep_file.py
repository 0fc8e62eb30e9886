"""What a file in `configs/sweeps/` may say: a recipe, what is varied, and how each run is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, model_validator

from data_prep.errors import UserError, nearest
from medpretrain.recipe_file import recipes_folder
from medpretrain.strict_yaml import Document
from medpretrain.sweep.transformations import Transformation

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
"""What becomes a part of a folder's name."""
Text = Annotated[str, StringConstraints(min_length=1)]
Value = bool | int | float | str
PLACE = "{}"
"""Where an axis's value goes in its overrides."""
METRICS = ("accuracy", "balanced_accuracy", "auroc", "aupr", "sensitivity", "specificity", "f1", "brier", "ece")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pairs(_Section):
    """The matrix of pairs of transformations: no other is applied in its runs."""

    how: Literal["together", "apart"]
    """together: i and then j on every view; a run for each of the n (n + 1) / 2 unordered pairs, for a view applies its
    transformations in one order whatever the recipe says. apart: i on the first view, j on the second; n x n runs."""
    transformations: tuple[Transformation, ...] = ()
    """Those of the matrix, with the strength and probability they have in the recipe; by default all that it has on."""


class LeaveOneOut(_Section):
    """The recipe as it is, and without one of its transformations."""

    transformations: tuple[Transformation, ...] = ()
    """Those left out in turn; by default all that the recipe has on."""


class Axis(_Section):
    """One thing that is varied: by values that go into overrides, or by cases that are overrides of their own."""

    name: Text
    """How the table and the figure call it."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, with {} where the value goes: train.global_batch={}."""
    values: tuple[Value, ...] = ()
    cases: dict[Word, tuple[str, ...]] = {}
    """Names, and the overrides that each stands for."""

    @model_validator(mode="after")
    def _values_or_cases(self) -> Axis:
        if bool(self.values) == bool(self.cases) or bool(self.values) != bool(self.set):
            raise ValueError("an axis has values and set, or cases")
        if self.set and not any(PLACE in override for override in self.set):
            raise ValueError(f"no override in set has a {PLACE} where the value would go")
        if len(set(map(str, self.values))) < len(self.values):
            raise ValueError("a value stands twice in an axis")
        return self


class Evaluate(_Section):
    """One `medpretrain evaluate` after each training."""

    protocol: Literal["knn", "linear", "finetune"]
    dataset: str | None = None
    """By default the one that was trained on."""
    label: str = "class"
    variant: str | None = None
    fractions: tuple[Annotated[float, Gt(0), Le(100)], ...] = ()
    """Percent of the labelled patients that the classifier learns from."""
    options: tuple[str, ...] = ()
    """Further words of the command."""

    def words(self, run: Path, trained_on: str, device: str) -> list[str]:
        """The words after `medpretrain`."""
        words = ["evaluate", self.protocol, str(run), self.dataset or trained_on, "--label", self.label]
        if self.variant:
            words += ["--variant", self.variant]
        if self.fractions:
            words += ["--fractions", ",".join(f"{fraction:g}" for fraction in self.fractions)]
        if device != "auto":
            words += ["--device", device]
        return [*words, *self.options]


def _one_or_several(given: Any) -> Any:
    return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


class Sweep(_Section):
    """A recipe that expands to runs."""

    name: Word
    about: str = ""
    recipe: Annotated[tuple[str, ...], BeforeValidator(_one_or_several), MinLen(1)]
    """A shipped recipe's name, a .yaml file, or a list of them that are compared."""
    overrides: tuple[str, ...] = ()
    """Of every run, key=value, as on the command line."""
    pairs: Pairs | None = None
    leave_one_out: LeaveOneOut | None = None
    grid: tuple[Axis, ...] = ()
    """Every combination of the axes' values is a run."""
    seeds: tuple[Annotated[int, Ge(0)], ...] = ()
    """Each run is repeated with these; by default once, with the recipe's own."""
    evaluate: Annotated[tuple[Evaluate, ...], MinLen(1)]
    metric: str = "accuracy"
    """What the figure shows."""

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if sum(map(bool, (self.pairs, self.leave_one_out, self.grid))) != 1:
            raise ValueError("give one of pairs, leave_one_out and grid")
        for what, given in (("recipe", self.recipe), ("axis", [axis.name for axis in self.grid]), ("seed", self.seeds)):
            if len(set(given)) < len(given):
                raise ValueError(f"a {what} stands twice in it")
        if self.metric not in METRICS:
            raise ValueError(f"there is no metric {self.metric!r}{nearest(self.metric, METRICS)}")
        return self


def sweep_files() -> dict[str, Path]:
    """The shipped sweeps by name."""
    return {path.stem: path for path in sorted((recipes_folder() / "sweeps").glob("*.yaml"))}


def load_sweep(name: str) -> Sweep:
    """A shipped sweep, or a YAML file; the recipes in it are not looked at.

    Args:
        name: a shipped sweep's name, or a path that ends in .yaml or .yml.

    Raises:
        UserError: no such sweep; not YAML; an unknown key, a wrong type or a value out of range, naming where.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"there is no sweep file {name}")
        return Document(Path(name), "a sweep").checked(Sweep)
    shipped = sweep_files()
    if name not in shipped:
        raise UserError(f"there is no sweep {name!r}{nearest(name, shipped)}; shipped are {', '.join(shipped)}")
    return Document(shipped[name], "a sweep").checked(Sweep)
