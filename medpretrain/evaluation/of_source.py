"""`medpretrain evaluate`: what was asked for, measured on one or several processes, shown and written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.dataset import Dataset
from data_prep.errors import UserError, nearest
from medpretrain.evaluation import results
from medpretrain.evaluation.evaluate import evaluate
from medpretrain.evaluation.plan import choose_images
from medpretrain.evaluation.projection import TECHNIQUES
from medpretrain.evaluation.protocols import Asked
from medpretrain.evaluation.results import Evaluation
from medpretrain.evaluation.show import space_table, table
from medpretrain.evaluation.source import Source, open_source, untrained
from medpretrain.evaluation.space_of import measure_space
from medpretrain.evaluation.space_record import SUFFIX, SpaceRecord
from medpretrain.training.process import choose_device, joined
from medpretrain.training.start import RECIPE_FILE

EVALUATIONS = "evaluation"
"""The folder in a run's."""

_log = logging.getLogger(__name__)


def evaluate_source(
    asked: Asked,
    spec: str,
    dataset: Path,
    *,
    label: str = "class",
    baseline: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    test_dataset: Path | None = None,
    fractions: Sequence[float] = (100.0,),
    folds: int = 0,
    repeats: int = 1,
    seeds: Sequence[int] = (0,),
    leave_out: bool = False,
    resamples: int = 1000,
    size: int | None = None,
    device: str = "auto",
    cache: Path | None = None,
    out: Path | None = None,
) -> list[Evaluation]:
    """Evaluate, print a table and write the files.

    Args:
        asked: the protocol and its settings.
        spec: what to evaluate, see `open_source`.
        dataset: a prepared dataset.
        baseline: `random`, to do the same with the same network untrained.
        size: pixels of a source that does not say.
        cache: the folder of kept features; None: none are kept.
        out: the folder to write into; RUN/evaluation for a run.
        label, train_split, test_split, test_dataset, folds, leave_out: see `choose_images`.
        fractions, seeds, repeats: see `plan`.

    Returns:
        Of the source and, where asked for, of the baseline.

    Raises:
        UserError: no such source, dataset, label or split; what cannot be evaluated.
    """
    if baseline not in (None, "random"):
        raise UserError(f"there is no baseline {baseline!r}{nearest(str(baseline), ['random'])}")
    folder = out or results_folder(spec)
    data = Dataset.open(dataset)
    images = choose_images(
        data,
        label=label,
        train_split=train_split,
        test_split=test_split,
        test_dataset=Dataset.open(test_dataset) if test_dataset else None,
        folds=folds,
        leave_out=leave_out,
    )
    sources: list[Source] = [open_source(spec, dataset=data, size=size)]
    if baseline:
        if sources[0].kind == "random":
            raise UserError(f"{spec} is untrained itself: it is its own baseline")
        sources.append(untrained(sources[0]))
    done = []
    with joined(device) as process:
        for source in sources:
            evaluation, predictions = evaluate(
                asked,
                source,
                images,
                label=label,
                train_split=train_split,
                test_split=test_split,
                fractions=fractions,
                seeds=seeds,
                repeats=repeats,
                resamples=resamples,
                process=process,
                cache=cache,
            )
            done.append(evaluation)
            if process.leads:
                path = results.write(folder, evaluation, predictions)
                _log.info("written to %s", path)
        if process.leads:
            Console().print(table(done))
    return done


def measure_source(
    spec: str,
    dataset: Path,
    *,
    label: str = "class",
    split: str = "test",
    view: str = "source",
    views: int = 2,
    projections: Sequence[str] = TECHNIQUES,
    other_patients_only: bool = False,
    leave_out: bool = False,
    images: bool = True,
    seed: int = 0,
    size: int | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> SpaceRecord:
    """Measure a representation space, print its numbers and write the files.

    Args:
        spec: what to look at, see `open_source`.
        dataset: a prepared dataset.
        view: `source`, how a run's own views are augmented; or `default`, the same for every source.
        size: pixels of a source that does not say.
        out: the folder to write into; RUN/evaluation for a run.
        label, split, views, projections, other_patients_only, leave_out, images, seed: see `measure_space`.

    Raises:
        UserError: no such source, dataset, label, split, view or projection; the source's own view of what is no run.
    """
    if view not in ("source", "default"):
        raise UserError(f"there is no view {view!r}{nearest(view, ('source', 'default'))}")
    folder = out or results_folder(spec)
    data = Dataset.open(dataset)
    source = open_source(spec, dataset=data, size=size)
    own = source.view if view == "source" else None
    if view == "source" and own is None:
        raise UserError(f"{spec} has no views of its own: say --view default")
    record = measure_space(
        source,
        data,
        label=label,
        split=split,
        out_folder=folder,
        images=images,
        views=views,
        view=own,
        view_from="source" if own else "given",
        projections=projections,
        other_patients_only=other_patients_only,
        leave_out=leave_out,
        seed=seed,
        device=choose_device(device),
    )
    Console().print(space_table(record))
    _log.info("written to %s", folder / f"{record.file_stem()}{SUFFIX}")
    return record


def results_folder(spec: str) -> Path:
    """Where the evaluations of a source lie if nothing else is said.

    Raises:
        UserError: it is no run, so somebody must say.
    """
    path = Path(spec)
    for run in (path, path.parent.parent):  # a run, or one of its checkpoints
        if (run / RECIPE_FILE).is_file():
            return run / EVALUATIONS
    raise UserError(f"{spec} is no run: say with --out which folder the results go to")
