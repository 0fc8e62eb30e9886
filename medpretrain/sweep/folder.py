"""The folder of a sweep: what is planned, what is done, and what came of it.

OUT/
  plan.json           the runs
  NAME/               a run, as `medpretrain train` leaves it
  NAME.log            what its training and its evaluations said
  NAME.done.json      that it was trained, and the files of its evaluations
  sweep.csv, .json    what came of it; sweep.png and sweep.svg show it
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError
from medpretrain.sweep.expand import SweepRun
from medpretrain.sweep.sweep_file import Sweep, Value
from medpretrain.whole import whole_file

PLAN, RESULTS = "plan.json", "sweep.json"
PLAN_FORMAT, DONE_FORMAT, VERSION = "medpretrain sweep plan", "medpretrain sweep run", 1
RECIPE_FILE = "recipe.yaml"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Record = TypeVar("Record", bound=BaseModel)


class PlannedRun(_Record):
    """A run as `expand` gave it."""

    number: int
    name: str
    recipe: str
    recipe_sha256: str
    overrides: tuple[str, ...]
    axes: dict[str, Value]


class Plan(_Record):
    """What a sweep's folder is filled with."""

    format: Literal["medpretrain sweep plan"] = "medpretrain sweep plan"
    version: Literal[1] = 1
    sweep: Sweep
    runs: tuple[PlannedRun, ...]


class Done(_Record):
    """What of a run is done."""

    format: Literal["medpretrain sweep run"] = "medpretrain sweep run"
    version: Literal[1] = 1
    recipe_sha256: str
    """Of the planned recipe."""
    trained: str
    """SHA-256 of RUN/recipe.yaml when training had ended."""
    evaluations: dict[str, tuple[str, ...]] = {}
    """For each evaluation, by the words of its command after source and dataset, its files in RUN/evaluation."""


class Folder:
    """A sweep's folder.

    Raises:
        UserError: a file, or it holds another sweep or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, name: str) -> Path:
        return self.path / name

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def write_plan(self, sweep: Sweep, runs: Sequence[SweepRun]) -> Plan:
        """Keep what is to be done; jobs of an array may all do so at once. A sweep that was changed takes the place of
        its earlier plan: runs that are the same stay done.

        Raises:
            UserError: the folder holds another sweep, or something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file")
        if (self.path / PLAN).is_file():
            other = self.plan().sweep.name
            if other != sweep.name:
                raise UserError(f"{self.path} holds the sweep {other!r}, not {sweep.name!r}; give another --out")
        elif self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"{self.path} holds something that is not a sweep; give another --out")
        plan = Plan(sweep=sweep, runs=tuple(planned(run) for run in runs))
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / PLAN, plan)
        return plan

    def plan(self) -> Plan:
        """
        Raises:
            UserError: the folder is no sweep's, or of a newer medpretrain.
        """
        return _read(self.path / PLAN, Plan, PLAN_FORMAT)

    def done(self, run: PlannedRun) -> Done | None:
        """What is done of a run; None where it is not trained to its end as it is planned now.

        What is said is held against what is there: a run folder that was taken away is not done, nor is an evaluation
        whose file is gone.
        """
        file = self._done_file(run.name)
        if not file.is_file():
            return None
        done = _read(file, Done, DONE_FORMAT)
        if done.recipe_sha256 != run.recipe_sha256 or done.trained != _sha256(self.run(run.name) / RECIPE_FILE):
            return None
        there = {
            words: names
            for words, names in done.evaluations.items()
            if all((self.evaluations(run.name) / name).is_file() for name in names)
        }
        return done.model_copy(update={"evaluations": there})

    def mark_trained(self, run: PlannedRun) -> None:
        trained = _sha256(self.run(run.name) / RECIPE_FILE)
        assert trained is not None, f"{run.name} has ended well without a recipe"
        _write(self._done_file(run.name), Done(recipe_sha256=run.recipe_sha256, trained=trained))

    def mark_evaluated(self, run: PlannedRun, words: str, files: Sequence[str]) -> None:
        done = self.done(run)
        assert done is not None
        now = {**done.evaluations, words: tuple(sorted(files))}
        _write(self._done_file(run.name), done.model_copy(update={"evaluations": now}))

    def evaluations(self, name: str) -> Path:
        return self.run(name) / "evaluation"

    def _done_file(self, name: str) -> Path:
        return self.path / f"{name}.done.json"


def planned(run: SweepRun) -> PlannedRun:
    return PlannedRun(
        number=run.number,
        name=run.name,
        recipe=run.recipe,
        recipe_sha256=run.resolved.sha256,
        overrides=run.overrides,
        axes=dict(run.axes),
    )


def _sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


# What evaluates needs more than a login node has, which prints commands and reads no folder.
def _read(path: Path, record: type[Record], format: str) -> Record:
    from medpretrain.evaluation.results import read_record

    return read_record(path, record, format, VERSION)


def _write(path: Path, record: BaseModel) -> None:
    with whole_file(path) as partial:
        partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
