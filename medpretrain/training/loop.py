"""A run from its recipe to its last checkpoint."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from data_prep.errors import UserError
from medpretrain.checkpoints import CheckpointInfo, Saver, load, open_target
from medpretrain.data.balance import balanced_order
from medpretrain.data.batches import Share, Stream
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import InOrder, SampleSequence
from medpretrain.data.views import View
from medpretrain.health.preemption import Preemption
from medpretrain.health.restarts import going_on, refuse_no_progress
from medpretrain.health.watchdog import Watchdog
from medpretrain.methods import method_class
from medpretrain.methods.base import TrainingSet
from medpretrain.models.batchnorm import use_global_batchnorm
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import dump_recipe
from medpretrain.tracking.of_run import check_tracking
from medpretrain.training.build import DatasetFacts, build_method, image_size, refuse_batchnorm_of_one, training_set
from medpretrain.training.process import Process, joined
from medpretrain.training.reporting import note, reporting
from medpretrain.training.start import RECIPE_FILE, check_folder, only_writer, start_from
from medpretrain.training.steps import Steps
from medpretrain.training.strategies import refuse_strategy
from medpretrain.training.survey import Surveyor
from medpretrain.training.trainer import Trainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """Where a run ended."""

    run: Path
    step: int
    checkpoint: str
    """Its path or URL."""


@dataclass(frozen=True)
class Ready:
    """All that trains, before there is a run folder.

    Attributes:
        recipe: with the data's mean and std.
        total: steps of the whole run.
        facts: of the datasets, for the checkpoint.
    """

    recipe: Recipe
    dataset: Mixture
    stream: Stream
    trainer: Trainer
    total: int
    about: CheckpointInfo
    facts: DatasetFacts


def train(recipe: Recipe, resume: str | Path = "auto", override: Collection[str] = ()) -> Finished:
    """Train what the recipe says, from the newest committed checkpoint of its run folder if there is one.

    Args:
        resume: `auto`; `never`, which refuses a folder that has checkpoints; or the path or URL of a checkpoint.
        override: keys of the recipe that may differ from the checkpoint's.

    Raises:
        UserError: no dataset, a backbone timm does not know, a checkpoint of another recipe or dataset, ...: before
            anything is written.
        RunFailed, Preempted, NoProgress: training ends before its last step.
    """
    if not recipe.data.path:
        raise UserError("the recipe names no dataset; give one, as in data.path=shards/fundus")
    check_tracking(recipe)
    refuse_strategy(recipe, method_class(recipe.method["name"]))
    run = recipe.run_dir
    with joined(recipe.device, hang_s=recipe.faults.hang_s, traces=run / "nccl") as process, ExitStack() as stack:
        ready = set_up(recipe, process)
        recipe, dataset, stream, trainer, about = ready.recipe, ready.dataset, ready.stream, ready.trainer, ready.about
        total = ready.total

        target = open_target(recipe.checkpoint.to, run)
        there = process.agreed(run.exists)
        if there:
            process.agreed(lambda: _hold(run, stack))
        now = process.agreed(lambda: going_on(run, str(resume)))
        found = start_from(run, target, now, about, recipe, override, process)
        step = 0
        if found is not None:
            load(found, trainer.parts(), process)
            trainer.loaded()
            step = found.step
            if step >= total:
                if process.leads:
                    _log.warning("the run in %s has all its %d steps already", run, total)
                return Finished(run, step, str(found))

        def open_folder() -> None:
            if not there:
                run.mkdir(parents=True, exist_ok=True)
                _hold(run, stack)
            refuse_no_progress(run, step, recipe.faults.restarts, str(resume))
            (run / RECIPE_FILE).write_text(about.recipe)

        process.agreed(open_folder)
        preemption = stack.enter_context(Preemption(process.world))
        # Before the watchdog, which then does not see rank 0 wait for a tracker at the end.
        reporter = stack.enter_context(reporting(recipe, about, process, total, step))
        faults = recipe.faults
        watchdog = stack.enter_context(
            Watchdog(process, hang_s=faults.hang_s, slow=faults.slow, on_event=lambda event: note(run, event))
        )
        keep = recipe.checkpoint
        saver = Saver(
            target,
            about,
            process,
            keep=keep.keep,
            keep_every=keep.keep_every,
            keep_best=keep.keep_best is not None,
            background=keep.background,
        )
        last = Steps(
            recipe,
            process,
            stream,
            trainer,
            Surveyor(
                lambda: survey_stream(recipe, dataset, process),
                recipe.train.precision,
                on_batch=lambda at: watchdog.mark(at, "survey"),
            ),
            reporter,
            target,
            saver,
            watchdog,
            preemption,
            dict(ready.facts),
            total,
            skipped=found.info.extra.get("skipped_steps", 0) if found is not None else 0,
        ).run(step)
        saver.close()
        watchdog.mark(total, "end")
        return Finished(run, last.step, str(last))


def set_up(recipe: Recipe, process: Process) -> Ready:
    """Open the datasets and build the networks under their strategy; a collective. Nothing is written.

    Raises:
        UserError: no dataset, a backbone timm does not know, a batch that the processes cannot share, ...
    """
    _configure(recipe, process)
    dataset = Mixture.open(recipe.data.path, recipe.data.weights, recipe.data.fraction)
    recipe = with_normalisation(recipe, dataset)
    stream = build_stream(recipe, dataset, process)
    total = recipe.train.steps or math.ceil((recipe.train.epochs or 0) * stream.steps_per_epoch)
    about = CheckpointInfo(dump_recipe(recipe), recipe.sha256, dataset.sha256, process.world, strategy=recipe.strategy)
    data = training_set(recipe, dataset, stream.order)
    known = TypeAdapter(TrainingSet).dump_python(data, mode="json")
    windows = [part.info.options.get("window") for part in dataset.datasets]
    facts = DatasetFacts(bit_depth=dataset.bit_depth, splits=dataset.splits, training=known, windows=windows)
    method = build_method(recipe, data).to(process.device)
    refuse_batchnorm_of_one(method, recipe, process.world)
    if process.world > 1 and recipe.train.sync_batchnorm:
        use_global_batchnorm(method, process.device)
    trainer = Trainer(method, recipe, process, total=total, steps_per_epoch=stream.steps_per_epoch)
    return Ready(recipe, dataset, stream, trainer, total, about, facts)


def _hold(run: Path, stack: ExitStack) -> None:
    check_folder(run)
    stack.enter_context(only_writer(run))


def with_normalisation(recipe: Recipe, dataset: Mixture) -> Recipe:
    """The recipe with the data's own mean and std where it names none, so that they travel with the weights.

    They are the split's, also where data.balance shows its images in other proportions: none are measured by class.
    """
    if recipe.data.mean is not None:
        return recipe
    mean, std = dataset.normalisation(recipe.data.split, recipe.data.channels)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"mean": mean, "std": std})})


def survey_stream(recipe: Recipe, dataset: Mixture, process: Process) -> Stream:
    """The training images whole and in their order."""
    whole = {"whole": View(size=image_size(recipe))}
    untraced = recipe.data.model_copy(update={"trace": False})
    plain = recipe.model_copy(update={"views": whole, "data": untraced})
    return build_stream(plain, dataset, process, InOrder(len(dataset.rows(recipe.data.split))))


def build_stream(recipe: Recipe, dataset: Mixture, process: Process, order: SampleSequence | None = None) -> Stream:
    data = recipe.data
    assert data.mean is not None
    assert data.std is not None
    if order is None and data.balance is not None:
        order = balanced_order(
            dataset,
            data.balance.label,
            data.balance.how,
            split=data.split,
            seed=recipe.seed,
            global_batch=recipe.train.global_batch,
        )
    return Stream(
        dataset,
        recipe.views,
        split=data.split,
        seed=recipe.seed,
        global_batch=recipe.train.global_batch,
        channels=data.channels,
        mean=data.mean,
        std=data.std,
        device=process.device,
        threads=data.threads or process.cores,
        labels=data.labels,
        block_shards=data.block_shards,
        share=Share(process.rank, process.world, recipe.train.micro_batches),
        order=order,
        trace=recipe.run_dir / f"samples-rank{process.rank}.jsonl" if data.trace else None,
        replace_limit=recipe.faults.replaced_samples,
        replaced=recipe.run_dir / f"replaced-rank{process.rank}.jsonl",
    )


def _configure(recipe: Recipe, process: Process) -> None:
    torch.manual_seed(recipe.seed)  # the same initial weights on every rank
    torch.set_num_threads(recipe.train.threads or process.cores)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not recipe.train.deterministic
