"""Evaluate one backbone by one protocol: from its images to a record of every number and what it stands on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

import medpretrain
from data_prep.dataset import Dataset
from medpretrain.evaluation.features import features
from medpretrain.evaluation.intervals import require_resamples, summarise
from medpretrain.evaluation.labelled import Labelled, knowledge
from medpretrain.evaluation.metrics import metrics
from medpretrain.evaluation.plan import Images, Split, plan
from medpretrain.evaluation.protocols import Asked, Features, Scored, score
from medpretrain.evaluation.results import DataRecord, Evaluation, Predictions, Unit
from medpretrain.evaluation.source import Source
from medpretrain.training.process import Process

ALONE = Process(0, 1, 0, 1, torch.device("cpu"))


def evaluate(
    asked: Asked,
    source: Source,
    images: Images,
    *,
    label: str,
    train_split: str = "train",
    test_split: str = "test",
    fractions: Sequence[float] = (100.0,),
    seeds: Sequence[int] = (0,),
    repeats: int = 1,
    resamples: int = 1000,
    process: Process = ALONE,
    cache: Path | None = None,
) -> tuple[Evaluation, Predictions]:
    """Fit every classifier of the plan, score its test images, and sum up.

    Under several processes features are shared out by image and classifiers by split; every process gets the whole
    result, which does not depend on how many there are.

    Args:
        asked: the protocol and its settings.
        source: the backbone.
        images: from `choose_images`.
        label: its name, for the record; the splits' too.
        fractions, seeds, repeats: see `plan`.
        resamples: of the bootstrap by patients; 0: no intervals.
        process: this one; its device is where networks run.
        cache: the folder of kept features; None: none are kept.

    Raises:
        UserError: see `plan`; features that are not finite; too few patients of a class for an interval.
    """
    started = time.perf_counter()
    splits = plan(images, fractions=fractions, seeds=seeds, repeats=repeats, draws_nothing=asked.draws_nothing)
    _refuse_early(splits, images, resamples)
    of_images = _features(source, images, process, cache) if asked.on_features else None
    mine = {
        number: score(asked, splits[number], images, source, of_images, process.device, process.cores)
        for number in range(process.rank, len(splits), process.world)
    }
    scored = _from_all(mine, process)
    classes = images.train.classes
    units, predicted = [], []
    for number, split in enumerate(splits):
        scores, labels = scored[number].scores_MK, images.test.labels_N[split.test]
        units.append(
            Unit(
                number=number,
                fraction=split.fraction,
                seed=split.seed,
                repeat=split.repeat,
                fold=split.fold,
                n_train=len(split.train),
                n_val=len(split.val),
                n_test=len(split.test),
                parameters=scored[number].parameters,
                metrics=metrics(scores, labels, classes),
            )
        )
        predicted.append(_predictions(number, images.test, split, scores))
    predictions = Predictions.joined(predicted)
    evaluation = Evaluation(
        protocol=asked.protocol,
        variant=asked.variant,
        parameters=asked.model_dump(exclude={"protocol", "variant"}),
        source=source.record(),
        data=_data(images, label, train_split, test_split),
        folds=images.folds,
        repeats=repeats,
        seeds=list(seeds),
        units=units,
        summaries=summarise(units, predictions, classes, resamples=resamples),
        seconds=time.perf_counter() - started,
        device=process.device.type,
        medpretrain_version=medpretrain.__version__,
    )
    return evaluation, predictions


def _refuse_early(splits: Sequence[Split], images: Images, resamples: int) -> None:
    """What would be refused after hours of fine-tuning: an interval that these patients cannot give."""
    for fraction in {split.fraction for split in splits} if resamples else ():
        tested = [(number, split.test) for number, split in enumerate(splits) if split.fraction == fraction]
        places = np.concatenate([test for _, test in tested])
        require_resamples(
            np.repeat([number for number, _ in tested], [len(test) for _, test in tested]),
            images.test.patients_N[places],
            images.test.labels_N[places],
            images.test.classes,
            resamples=resamples,
        )


def _features(source: Source, images: Images, process: Process, cache: Path | None) -> Features:
    """One pass over the images of each dataset, whatever the number of splits."""
    parts = {"train": images.train, "test": images.test, **({"val": images.val} if images.val else {})}
    found: dict[str, NDArray[np.float32]] = {}
    for dataset in {part.dataset.sha256: part.dataset for part in parts.values()}.values():
        here = {name: part for name, part in parts.items() if part.dataset.sha256 == dataset.sha256}
        rows = np.unique(np.concatenate([part.rows_N for part in here.values()]))
        of_rows = features(source, dataset, rows, process=process, cache=cache)
        for name, part in here.items():
            found[name] = of_rows[np.searchsorted(rows, part.rows_N)]
    return Features(found["train"], found.get("val", found["train"][:0]), found["test"])


def _from_all(mine: dict[int, Scored], process: Process) -> dict[int, Scored]:
    if process.world == 1:
        return mine
    everyone: list[dict[int, Scored]] = [{} for _ in range(process.world)]
    dist.all_gather_object(everyone, mine)
    return {number: one for part in everyone for number, one in part.items()}


def _predictions(number: int, test: Labelled, split: Split, scores: NDArray[np.float64]) -> Predictions:
    rows = test.rows_N[split.test]
    return Predictions(
        np.full(len(rows), number, np.int32), rows, test.patients_N[split.test], test.labels_N[split.test], scores
    )


def _data(images: Images, label: str, train_split: str, test_split: str) -> DataRecord:
    train, test = images.train, images.test
    left_out = {"all": train.left_out} if images.folds else {train_split: train.left_out, test_split: test.left_out}
    if images.val:
        left_out["val"] = images.val.left_out
    known = {knowledge(part.dataset) for part in (train, test)}
    return DataRecord(
        name=_name(train.dataset),
        sha256=train.dataset.sha256,
        label=label,
        classes=list(train.classes),
        train_split="all" if images.folds else train_split,
        test_split="all" if images.folds else test_split,
        test_name=_name(test.dataset),
        test_sha256=test.dataset.sha256,
        train_counts=train.counts(),
        test_counts=test.counts(),
        left_out=left_out,
        patients=known.pop() if len(known) == 1 else "partly known",
    )


def _name(dataset: Dataset) -> str:
    return dataset.path.resolve().name
