"""A run from its recipe to its last checkpoint."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_prep.errors import UserError, WorkFailed
from medpretrain.data.balance import balanced_order
from medpretrain.data.batches import Share, Stream
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import InOrder, SampleSequence
from medpretrain.data.views import View
from medpretrain.methods import method_class
from medpretrain.models.batchnorm import use_global_batchnorm
from medpretrain.recipe import Recipe, flatten
from medpretrain.recipe_file import dump_recipe, read_recipe
from medpretrain.training import checkpoint
from medpretrain.training.build import DatasetFacts, build_method, image_size, refuse_batchnorm_of_one, training_set
from medpretrain.training.checkpoint import CheckpointInfo
from medpretrain.training.collapse import CollapseAlarm, of_global_batch, representation
from medpretrain.training.display import Display
from medpretrain.training.metrics_log import MetricsLog, read_metrics
from medpretrain.training.process import Process, joined
from medpretrain.training.survey import Surveyor
from medpretrain.training.tracking import Tracker
from medpretrain.training.trainer import Measured, Trainer, mean_loss

_log = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path

RECIPE_FILE, METRICS_FILE = "recipe.yaml", "metrics.jsonl"


class RunFailed(WorkFailed):
    """Training cannot go on; the message names the cause, the step and how to resume."""


@dataclass(frozen=True)
class Finished:
    """Where a run ended."""

    run: Path
    step: int
    checkpoint: Path


def train(recipe: Recipe, resume: Resume = "auto") -> Finished:
    """Train what the recipe says, from the newest committed checkpoint of its run folder if there is one.

    Args:
        resume: `auto`; `never`, which refuses a folder that has checkpoints; or one checkpoint's folder.

    Raises:
        UserError: no dataset, a backbone timm does not know, a checkpoint of another recipe or dataset, ...: before
            anything is written.
        RunFailed: a loss that is not finite.
    """
    if not recipe.data.path:
        raise UserError("the recipe names no dataset; give one, as in data.path=shards/fundus")
    with joined(recipe.device) as process, ExitStack() as stack:
        _configure(recipe, process)
        dataset = Mixture.open(recipe.data.path, recipe.data.weights)
        recipe = with_normalisation(recipe, dataset)
        stream = build_stream(recipe, dataset, process)
        total = recipe.train.steps or math.ceil((recipe.train.epochs or 0) * stream.steps_per_epoch)
        about = CheckpointInfo(dump_recipe(recipe), recipe.sha256, dataset.sha256, process.world)
        data = training_set(recipe, dataset, stream.order)
        facts = DatasetFacts(bit_depth=dataset.bit_depth, splits=dataset.splits, training=dataclasses.asdict(data))
        method = build_method(recipe, data).to(process.device)
        refuse_batchnorm_of_one(method, recipe, process.world)
        if process.world > 1 and recipe.train.sync_batchnorm:
            use_global_batchnorm(method, process.device)
        trainer = Trainer(method, recipe, process, total=total, steps_per_epoch=stream.steps_per_epoch)

        start_from = process.agreed(lambda: _start_from(recipe.run_dir, resume))
        step = 0
        if start_from is not None:
            state, info = checkpoint.load(start_from, map_location=process.device)
            _refuse_other(recipe, info, about, start_from)
            trainer.load_state_dict(state)
            step = info.step
            del state
        run = recipe.run_dir

        def open_folder() -> None:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_only_writer(run))
            (run / RECIPE_FILE).write_text(about.recipe)

        process.agreed(open_folder)
        reporter = stack.enter_context(_reporting(recipe, about, process, total, step))

        def save(step: int) -> Path:
            if process.leads:
                reporter.flush()
            state = trainer.state_dict() | {"dataset": dict(facts)}
            return process.agreed(lambda: checkpoint.save(run, step, state, about, recipe.checkpoint.keep))

        surveyor = Surveyor(lambda: survey_stream(recipe, dataset, process), recipe.train.precision)
        return _steps(recipe, stream, trainer, surveyor, reporter, save, step, total)


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


def _steps(
    recipe: Recipe,
    stream: Stream,
    trainer: Trainer,
    surveyor: Surveyor,
    reporter: _Reporter,
    save: Callable[[int], Path],
    step: int,
    total: int,
) -> Finished:
    run, every = recipe.run_dir, recipe.train
    committed = checkpoint.newest(run) if step >= total else None
    if committed is not None:
        _log.warning("the run in %s has all its %d steps already", run, total)
        return Finished(run, step, committed)
    batches = stream.batches(step)
    try:
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            reporter.waited(time.perf_counter() - asked)
            surveyor.before_step(trainer.method, trainer.progress(step))
            measured = trainer.step(batch)
            step += 1
            last = step == total
            if last or step % every.log_every == 0:
                loss = mean_loss(measured.loss)
                if not math.isfinite(loss):
                    raise RunFailed(
                        f"the loss is {loss} at step {step}; the checkpoints in {run} are from before it. A lower "
                        "optim.lr, a longer optim.warmup or optim.clip are the usual cures"
                    )
                features = of_global_batch(measured.features)
                reporter.report(step, loss, measured, features, epoch=step / stream.steps_per_epoch)
            if last or step % recipe.checkpoint.every == 0:
                committed = save(step)
                if last:
                    return Finished(run, step, committed)
    finally:
        batches.close()


def _start_from(run: Path, resume: Resume) -> Path | None:
    """The checkpoint to go on from; the run folder's state is checked before anything is written into it."""
    if run.exists() and not run.is_dir():
        raise UserError(f"run.dir={run} is a file")
    if run.is_dir() and any(run.iterdir()) and not (run / RECIPE_FILE).is_file():
        raise UserError(f"run.dir={run} holds something that is not a run; give another folder")
    if isinstance(resume, Path):
        return resume
    kept = sorted((run / "checkpoints").glob("step-*"))
    if kept and resume == "never":
        raise UserError(f"{run} has checkpoints already and --resume never would train over them; set another run.dir")
    found = checkpoint.newest(run) if kept else None
    if kept and found is None:
        raise UserError(f"none of the checkpoints in {run / 'checkpoints'} is whole; move them away to start anew")
    return found


def _refuse_other(recipe: Recipe, found: CheckpointInfo, about: CheckpointInfo, path: Path) -> None:
    if found.dataset_sha256 != about.dataset_sha256:  # first, for mean and std in the recipe follow from the data
        paths = dict(zip(about.dataset_sha256, recipe.data.path, strict=True))
        if paths.keys() == set(found.dataset_sha256):
            order = ",".join(paths[sha256] for sha256 in found.dataset_sha256)
            raise UserError(f"{path} has its datasets in another order; go on with data.path=[{order}]")
        theirs = ", ".join(sha256[:12] for sha256 in found.dataset_sha256)
        ours = ", ".join(f"{name} ({sha256[:12]})" for sha256, name in paths.items())
        raise UserError(
            f"{path} is of another dataset: it has seen {theirs}, and data.path is {ours}; set another run.dir"
        )
    if found.recipe_sha256 != about.recipe_sha256:
        raise UserError(f"{path} is of another recipe: {_difference(recipe, found)}; set another run.dir")


def _difference(recipe: Recipe, found: CheckpointInfo) -> str:
    ours, theirs = recipe.identity(), read_recipe(found.recipe).identity()
    keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    shown = [f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in keys[:4]]
    return ", ".join(shown) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _configure(recipe: Recipe, process: Process) -> None:
    torch.manual_seed(recipe.seed)  # the same initial weights on every rank
    torch.set_num_threads(recipe.train.threads or process.cores)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not recipe.train.deterministic


@contextmanager
def _only_writer(run: Path) -> Iterator[None]:
    """Two runs never write into one folder.

    Raises:
        UserError: another process holds it.
    """
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {run}") from None
        yield


class _Reporter:
    """Rank 0's voice: metrics.jsonl first, then the display; the tracker follows the file."""

    def __init__(self, recipe: Recipe, start: int) -> None:
        self._batch = recipe.train.global_batch
        self._step, self._time, self._waited = start, time.perf_counter(), 0.0
        self.log: MetricsLog | None = None
        self.alarm: CollapseAlarm | None = None
        self.display: Display | None = None

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def report(self, step: int, loss: float, measured: Measured, features_NVD: Tensor, epoch: float) -> None:
        now = time.perf_counter()
        if self.log is not None and self.alarm is not None and self.display is not None:
            seconds = now - self._time
            row = {
                "step": step,
                "epoch": round(epoch, 4),
                "loss": loss,
                "lr": measured.lr,
                "grad_norm": measured.grad_norm.item(),
                **representation(features_NVD),
                "images_per_s": (step - self._step) * self._batch / seconds,
                "data_wait": self._waited / seconds,
            }
            self.log.append(row)
            self.display.update(row, self.alarm.update(row))
        self._step, self._time, self._waited = step, now, 0.0

    def flush(self) -> None:
        """Metrics reach the disk before the checkpoint that follows them."""
        if self.log is not None:
            self.log.sync()


@contextmanager
def _reporting(recipe: Recipe, about: CheckpointInfo, process: Process, total: int, start: int) -> Iterator[_Reporter]:
    reporter, run = _Reporter(recipe, start), recipe.run_dir
    if not process.leads:
        yield reporter
        return
    with ExitStack() as stack:
        reporter.log = stack.enter_context(MetricsLog(run / METRICS_FILE))
        reporter.log.truncate_after(start)
        tracker = Tracker(
            run,
            recipe.tracking.uri,
            recipe.tracking.experiment,
            recipe.name,
            {
                key: str(value)
                for key, value in flatten(
                    recipe.resolved() | {"recipe_sha256": about.recipe_sha256, "dataset_sha256": about.dataset_sha256}
                )
            },
            [run / RECIPE_FILE],
        )
        stack.push(lambda kind, *_: tracker.close(timeout_s=30.0, status="FAILED" if kind else "FINISHED"))
        method = method_class(recipe.method["name"])
        earlier = read_metrics(run / METRICS_FILE)
        reporter.alarm = CollapseAlarm(method.collapse_causes, by_rank=method.labels == "none", earlier=earlier)
        reporter.display = stack.enter_context(Display(total, start_step=start))
        yield reporter
