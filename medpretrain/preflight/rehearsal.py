"""One process of the rehearsal: it joins the others, measures the network, and takes some steps of the recipe."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from medpretrain.checkpoints import open_target
from medpretrain.checkpoints.parts import lay_out, share
from medpretrain.checkpoints.target import data_name
from medpretrain.health import last_words
from medpretrain.preflight import network
from medpretrain.preflight.report import RankReport, Rehearsed
from medpretrain.preflight.workers import Work, report_file
from medpretrain.recipe import Recipe, Run
from medpretrain.recipe_file import read_recipe
from medpretrain.tracking.of_run import check_tracking
from medpretrain.tracking.state import write_whole
from medpretrain.training.loop import Ready, set_up
from medpretrain.training.process import Process, joined
from medpretrain.training.start import check_folder, chosen, refuse_other, refuse_overrides, refuse_second_writer

_STEPS_S = 10.0
_FEWEST, _MOST = 3, 10
_DECODE_S = 2.0
_FILLED = 4  # batches that stand ready when a stream is asked for one: two of DALI's, two of ours
_HANG_S = 60.0  # collectives time out after twice as long


class Reporter:
    """Keeps what is known in a file, so that it is there too when the process is killed."""

    def __init__(self, folder: Path, report: RankReport) -> None:
        self._file, self.report = report_file(folder, report.rank), report
        self.tell()

    def tell(self, **changes: Any) -> None:
        self.report = dataclasses.replace(self.report, **changes)
        write_whole(self._file, json.dumps(TypeAdapter(RankReport).dump_python(self.report, mode="json")))


def rehearse(work: Work, recipe: Recipe, process: Process, reporter: Reporter) -> None:
    """A collective of all processes.

    Args:
        recipe: that of `work`, but its run folder is a temporary one.

    Raises:
        UserError: the recipe cannot be trained on these processes, this data, or into the run folder that `work` names.
    """
    if process.world > 1:
        reporter.tell(stage="all-reduce")
        reporter.tell(all_reduce_right=network.all_reduce_right(process))
        reporter.tell(stage="all-gather")
        reporter.tell(all_gather_right=network.all_gather_right(process))
        reporter.tell(stage="the speed of all-reduce")
        reporter.tell(all_reduce=network.all_reduce_speed(process))
        reporter.tell(stage="the speed of all-gather")
        reporter.tell(all_gather=network.all_gather_speed(process))
        reporter.tell(stage="the links between hosts")
        reporter.tell(links=network.links(process))
        if process.device.type == "cuda":
            reporter.tell(stage="gloo")
            _gloo(process)
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(process.device)
    reporter.tell(stage="building the networks")
    ready = set_up(recipe, process)
    trainer, stream = ready.trainer, ready.stream
    reporter.tell(stage="the run folder")
    own = read_recipe(work.recipe)
    done = process.agreed(lambda: _steps_done(own, ready, work.resume, work.override))
    survey = len(stream) if trainer.method.wants_survey(trainer.progress(0)) else 0
    reporter.tell(stage="the first step")
    batches = stream.batches(0)
    times: list[tuple[float, float]] = []
    not_finite = 0

    def step() -> float:
        nonlocal not_finite
        began = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        not_finite += not trainer.step(batch).finite
        _synchronise(process)
        times.append((got - began, time.perf_counter() - got))
        return sum(times[-1])

    try:
        first_s = step()
        if ready.total > 1:
            reporter.tell(stage="steps")
            second_s = step()
            count = process.agreed(lambda: min(_MOST, max(_FEWEST, int(_STEPS_S / second_s)), ready.total - 2))
            for _ in range(count):
                step()
    finally:
        batches.close()
    measured = times[2:] or times[1:] or times
    peak, device = _device_memory(process)
    reporter.tell(stage="the size of a checkpoint")
    layout = lay_out(share(trainer.parts(), process.rank, process.world), data_name(process.rank, process.world))
    images = recipe.train.global_batch // process.world
    reporter.tell(stage="the rate of the data")
    decode = _decoding(ready.stream, len(times), images, process)
    rehearsed = Rehearsed(
        images=images,
        step_s=median(step for _, step in measured),
        wait_s=median(wait for wait, _ in measured),
        first_s=first_s,
        decode_images_s=decode,
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_bytes=peak,
        device_bytes=device,
        checkpoint_bytes=layout.bytes,
        gradient_bytes=4 * sum(_elements(one) for one in trainer.method.parameters() if one.requires_grad),
        steps=ready.total,
        done=done,
        not_finite=not_finite,
        replaced=stream.replaced,
        survey=survey,
    )
    reporter.tell(stage="the end", rehearsed=rehearsed)


def _decoding(stream: Any, step: int, images: int, process: Process) -> float:
    """Images a second of the stream alone, once what was made ahead is used up."""
    batches = stream.batches(step)
    try:
        for _ in range(_FILLED):
            next(batches)
        _synchronise(process)
        began, count = time.perf_counter(), 0
        while count < 2 or (time.perf_counter() - began < _DECODE_S and count < 100):
            next(batches)
            count += 1
        _synchronise(process)
        return count * images / (time.perf_counter() - began)
    finally:
        batches.close()


def _device_memory(process: Process) -> tuple[int | None, int | None]:
    if process.device.type != "cuda":
        return None, None
    free, total = torch.cuda.mem_get_info(process.device)
    # What torch has reserved and could give back does not count; what is not torch's (DALI, NCCL, CUDA) does.
    besides = total - free - torch.cuda.memory_reserved(process.device)
    return torch.cuda.max_memory_allocated(process.device) + max(0, besides), total


def _gloo(process: Process) -> None:
    """Signals and checkpoints go through gloo on GPUs too: other ports, and perhaps another network, than NCCL's."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_HANG_S))
    dist.all_reduce(torch.ones(1), group=group)  # type: ignore[arg-type]  # every rank is in it


def _steps_done(recipe: Recipe, ready: Ready, resume: str, override: Collection[str]) -> int:
    """Of a run that is there already; what `train` would refuse in its folder is refused here. Changes nothing.

    Raises:
        UserError: see `training.start`.
    """
    run = recipe.run_dir
    check_folder(run)
    refuse_second_writer(run)
    refuse_overrides(override)
    found = chosen(run, open_target(recipe.checkpoint.to, run), resume, None, aside=False)
    if found is None:
        return 0
    refuse_other(ready.recipe, found, ready.about, override)
    return min(found.step, ready.total)


def _elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO's third stage leaves empty ones


def _synchronise(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


def take_part(work: Work, folder: Path) -> int:
    """Rehearse as the process that the environment describes; gives the exit code. What fails is in the report."""
    reporter = Reporter(folder, RankReport(int(os.environ["RANK"]), work.host))
    recipe = read_recipe(work.recipe)
    untraced = recipe.data.model_copy(update={"trace": False})
    recipe = recipe.model_copy(update={"run": Run(dir=str(folder / "run")), "data": untraced})
    try:
        check_tracking(recipe)
        reporter.tell(stage="joining the others")
        with joined(recipe.device, hang_s=_HANG_S) as process:
            rehearse(work, recipe, process, reporter)
    except Exception as error:  # whatever it is, it is this rank's row of the table
        cause = last_words.of(error)
        if cause.trace:
            print(cause.trace, file=sys.stderr, flush=True)
        reporter.tell(error=" ".join(cause.text.split())[:2000], consequence=cause.consequence)
        return cause.code or 1
    return 0
