"""What a report is made of: the runs, the evaluations and the descriptions of feature space in some folders."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from data_prep.errors import UserError
from medpretrain.evaluation import results
from medpretrain.evaluation.results import Evaluation, Predictions, SourceRecord
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import read_recipe
from medpretrain.report.spaces import SPACE_SUFFIX, Space, read_space
from medpretrain.tracking.metrics_log import Row, read_metrics
from medpretrain.tracking.provenance import ENVIRONMENT_FILE, PROVENANCE_FILE, dataset_hashes
from medpretrain.training.start import RECIPE_FILE

EVALUATION = "evaluation"
"""The folder of a run in which its evaluations lie."""
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Method:
    """What one row of a table and one colour stand for: a backbone with its preprocessing."""

    name: str
    """As shown; no other method of the report has it."""
    source: SourceRecord


@dataclass(frozen=True)
class Measured:
    """One evaluation, with the scores it stands on."""

    method: Method
    evaluation: Evaluation
    predictions: Predictions


@dataclass(frozen=True)
class Run:
    """One pretraining."""

    name: str
    folder: Path
    recipe: Recipe
    rows: list[Row]
    """Of its metrics; none where it wrote none down."""
    datasets: list[str]
    """The hash of each dataset it was trained on; none where it wrote none down."""
    starts: list[dict[str, Any]]
    environment: list[str]
    """The lines of its environment.txt."""


@dataclass(frozen=True)
class Group:
    """Evaluations that may stand in one table, one of each method."""

    key: str
    measured: list[Measured]
    pretrainings: int = 1
    """Of each method; its values are then means over them."""
    in_short: bool = False
    """Whether another group shows the same, with pretrainings together."""

    @property
    def first(self) -> Evaluation:
        return self.measured[0].evaluation

    @property
    def fractions(self) -> list[float]:
        """Percent of the training patients, ascending; what every method has."""
        return [summary.fraction for summary in self.first.summaries]


@dataclass(frozen=True)
class Material:
    """All of it."""

    methods: list[Method]
    runs: list[Run]
    groups: list[Group]
    spaces: list[tuple[Method, Space]]
    notes: list[str] = field(default_factory=list)
    """What a reader must know of how it was put together."""
    families: dict[str, list[str]] = field(default_factory=dict)
    """By name of a method that was pretrained several times the names of its members."""

    @property
    def measured(self) -> list[Measured]:
        return [one for group in self.groups for one in group.measured]


def gather(sources: Sequence[Path]) -> Material:
    """Read everything in run folders and folders of evaluations.

    Raises:
        UserError: no folder, one given twice, one without any evaluation; the same evaluation of the same weights
            twice; a file that a newer medpretrain wrote, that was changed, or that holds a value that is not finite.
    """
    if not sources:
        raise UserError("a report needs at least one run folder or folder of evaluations")
    _refuse_twice([source.resolve() for source in sources], sources)
    read: list[tuple[Path, Evaluation, Predictions]] = []
    spaces: list[tuple[Path, Space]] = []
    for source in sources:
        evaluations, described = _files(source)
        read += [(path, *_checked(path)) for path in evaluations]
        spaces += [(path, read_space(path)) for path in described]
    _refuse_same(read)
    records = [evaluation.source for _, evaluation, _ in read] + [space.record.source for _, space in spaces]
    methods = _methods(records)
    runs = [_run(source, read, methods) for source in sources if (source / RECIPE_FILE).is_file()]
    grouped: dict[str, list[Measured]] = defaultdict(list)
    for _, evaluation, predictions in read:
        grouped[evaluation.comparable()].append(Measured(methods[evaluation.source.sha256], evaluation, predictions))
    order = {method.name: place for place, method in enumerate(methods.values())}
    groups = [Group(key, sorted(measured, key=lambda one: order[one.method.name])) for key, measured in grouped.items()]
    return Material(
        methods=list(methods.values()),
        runs=_named_apart(runs),
        groups=sorted(groups, key=rank),
        spaces=[(methods[space.record.source.sha256], space) for _, space in spaces],
        notes=[
            f"{method.source.name} is the name of several backbones here; each has a piece of its hash behind it"
            for method in methods.values()
            if method.name != method.source.name
        ][:1],
    )


def rank(group: Group) -> tuple[object, ...]:
    """Pretrainings together, then most methods, then the protocol that leaves least to chance, then names."""
    first = group.first
    protocols = ("linear", "finetune", "knn")
    named = first.data.name, first.data.label, group.key
    return -group.pretrainings, -len(group.measured), protocols.index(first.protocol), *named


def _files(source: Path) -> tuple[list[Path], list[Path]]:
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    places = [source / EVALUATION] if (source / RECIPE_FILE).is_file() else [source, source / EVALUATION]
    evaluations = [path for place in places for path in sorted(place.glob(f"*{results.SUFFIX}"))]
    spaces = [path for place in places for path in sorted(place.glob(f"*{SPACE_SUFFIX}"))]
    if not evaluations and not spaces:
        raise UserError(f"{source} holds no evaluation; `medpretrain evaluate` makes one")
    return evaluations, spaces


def _checked(path: Path) -> tuple[Evaluation, Predictions]:
    evaluation, predictions = results.read(path)
    bad = _not_finite(evaluation.model_dump())
    if bad:
        raise UserError(f"{path} holds a value that is not finite: {bad}; evaluate again")
    if not np.isfinite(predictions.scores_RK).all():
        raise UserError(f"the scores beside {path} hold values that are not finite; evaluate again")
    for unit in evaluation.units:
        part = predictions.of_unit(unit.number)
        counted = np.zeros((len(evaluation.data.classes),) * 2, np.int64)
        np.add.at(counted, (part.label_R, part.scores_RK.argmax(axis=1)), 1)
        if counted.tolist() != unit.metrics.confusion:
            raise UserError(
                f"the scores beside {path} are not those that it counts (unit {unit.number}); evaluate again"
            )
    return evaluation, predictions


def _not_finite(value: object, name: str = "") -> str:
    """The dotted key of the first number that is not finite, or nothing."""
    if isinstance(value, dict):
        pairs: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return name if isinstance(value, float) and not np.isfinite(value) else ""
    return next(filter(None, (_not_finite(one, f"{name}.{key}".lstrip(".")) for key, one in pairs)), "")


def _refuse_twice(resolved: list[Path], sources: Sequence[Path]) -> None:
    for place, times in Counter(resolved).items():
        if times > 1:
            raise UserError(f"{sources[resolved.index(place)]} is given {times} times")


def _refuse_same(read: list[tuple[Path, Evaluation, Predictions]]) -> None:
    seen: dict[tuple[str, str], Path] = {}
    for path, evaluation, _ in read:
        key = evaluation.comparable(), evaluation.source.sha256
        if key in seen:
            raise UserError(f"{seen[key]} and {path} are the same evaluation of the same weights; give one of them")
        seen[key] = path


def _methods(records: Iterable[SourceRecord]) -> dict[str, Method]:
    """By hash of the weights, in order of appearance, what is untrained last."""
    first: dict[str, SourceRecord] = {}
    for record in records:
        first.setdefault(record.sha256, record)
    ordered = sorted(first.values(), key=lambda record: record.kind == "random")
    times = Counter(record.name for record in ordered)
    return {
        record.sha256: Method(record.name if times[record.name] == 1 else f"{record.name} {record.sha256[:6]}", record)
        for record in ordered
    }


def _run(source: Path, read: list[tuple[Path, Evaluation, Predictions]], methods: dict[str, Method]) -> Run:
    try:
        recipe = read_recipe((source / RECIPE_FILE).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{source / RECIPE_FILE} is no recipe of this version: {where}: {first['msg']}") from None
    own = [
        methods[evaluation.source.sha256].name
        for path, evaluation, _ in read
        if path.parent == source / EVALUATION and evaluation.source.kind == "run"
    ]
    datasets = dataset_hashes(source)
    provenance, environment = source / PROVENANCE_FILE, source / ENVIRONMENT_FILE
    return Run(
        name=own[0] if own else recipe.name,
        folder=source,
        recipe=recipe,
        rows=read_metrics(source / METRICS_FILE) if (source / METRICS_FILE).is_file() else [],
        datasets=datasets,
        starts=json.loads(provenance.read_text(encoding="utf-8"))["starts"] if datasets else [],
        environment=environment.read_text(encoding="utf-8").splitlines() if environment.is_file() else [],
    )


def _named_apart(runs: list[Run]) -> list[Run]:
    times = Counter(run.name for run in runs)
    seen: Counter[str] = Counter()
    named = []
    for run in runs:
        seen[run.name] += 1
        name = run.name if times[run.name] == 1 else f"{run.name} ({seen[run.name]})"
        named.append(replace(run, name=name))
    return named


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """For each group's key what its settings are where the groups of the same title differ."""
    titled: dict[tuple[object, ...], list[Group]] = defaultdict(list)
    for group in groups:
        first = group.first
        titled[first.title, first.data.name, first.data.label, group.pretrainings, group.in_short].append(group)
    found: dict[str, list[str]] = {}
    for alike in titled.values():
        flat = [_settings(group.first) for group in alike]
        keys = list(dict.fromkeys(key for one in flat for key in one))
        differing = [key for key in keys if len({one.get(key, "not given") for one in flat}) > 1]
        for group, one in zip(alike, flat, strict=True):
            found[group.key] = [f"{key}: {one.get(key, 'not given')}" for key in differing] if len(alike) > 1 else []
    return found


def _settings(evaluation: Evaluation) -> dict[str, str]:
    data = evaluation.data.model_dump()
    shown = {key: _short(key, value) for key, value in data.items()}
    shown |= {f"parameter {key}": str(value) for key, value in evaluation.parameters.items()}
    shown |= {key: str(getattr(evaluation, key)) for key in ("folds", "repeats", "seeds")}
    return shown


def _short(key: str, value: object) -> str:
    return f"{str(value)[:12]}" if key.endswith("sha256") else str(value)
