"""Training jobs of real processes, made to be killed, and what they left in their run folder.

Networks and images are tiny; everything else is `medpretrain train` as users start it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from warm import Started

from medpretrain.checkpoints import newest, open_target, read
from medpretrain.tracking.metrics_log import read_metrics, read_rollbacks

BATCH = 8
PATIENCE_S = 600.0
_OF_THE_MACHINE = ("time", "images_per_s", "data_wait")
"""Columns of metrics that no two runs share; `system/...` are others."""
_RECIPE = """\
name: {name}
data: {{path: {dataset}, {weights} channels: 1, labels: [{labels}], trace: true, threads: 1}}
backbone: {{name: {backbone}, drop_path: 0.2}}
views: {views}
method: {{name: {name}, {options}}}
optim: {{name: adamw, lr: 1.0e-4, weight_decay: 0.04, warmup: 0.2, clip: 3.0}}
train: {{steps: {steps}, global_batch: {batch}, deterministic: true, threads: 1, log_every: 1}}
checkpoint: {{every: {every}, keep: {keep}}}
faults: {{hang_s: 180}}
tracking: {{uri: none}}
"""


@dataclass(frozen=True)
class Case:
    """A method at the size of a test."""

    backbone: str
    views: str
    options: str
    labels: str = "modality, anatomy"


CASES = {
    "dino": Case(
        "test_vit",
        "{global: {size: 32, count: 2, crop: [0.4, 1]}, local: {size: 16, count: 2, crop: [0.1, 0.4], flip: 0.5}}",
        "prototypes: 32, hidden: 16, bottleneck: 8, freeze_last_layer_epochs: 0.5",
    ),
    "modan_mulsupcon": Case(
        "test_resnet",
        "{crop: {size: 32, count: 2, crop: [0.2, 1], jitter: {contrast: 0.4}, blur: {}, noise: {}}}",
        "projector: [16, 8]",
    ),
    "amimv": Case(
        "test_resnet",
        "{normalised: {size: 32}, augmented: {size: 32, crop: [0.2, 1], flip: 0.5, bias_field: {}}}",
        "momentum: 0.9, projector: [16, 8]",
    ),
    "kcl": Case(
        "test_resnet",
        "{crop: {size: 32, count: 2, crop: [0.2, 1], flip: 0.5}}",
        "projector: [16, 8], queue: 64, momentum: 0.9, positives: 2",
        labels="anatomy",
    ),
}


def write_recipe(
    path: Path,
    method: str,
    dataset: object,
    *,
    steps: int,
    every: int,
    weights: str = "",
    keep: int = 3,
    backbone: str | None = None,
) -> Path:
    """A recipe at `path`; `weights` as in `weights: [3, 1],`."""
    case = CASES[method]
    path.write_text(
        _RECIPE.format(
            name=method,
            dataset=dataset,
            weights=weights,
            labels=case.labels,
            backbone=backbone or case.backbone,
            views=case.views,
            options=case.options,
            steps=steps,
            batch=BATCH,
            every=every,
            keep=keep,
        )
    )
    return path


def make_dataset(folder: Path) -> Path:
    """Shards of 70 made-up images, 47 or so of them to train on."""
    from data_prep.images import prepare
    from data_prep.synthetic import IMAGES, LABELS, PATIENT_PATTERN, make_demo_images

    make_demo_images(folder / "made", per_class=7, size=40, seed=0)
    prepare(
        folder / "made" / IMAGES,
        folder / "shards",
        labels=str(folder / "made" / LABELS),
        patient_pattern=PATIENT_PATTERN,
        split={"train": 0.7, "test": 0.3},
        shard_size=10,
    )
    return folder / "shards"


class Job:
    """One launch of a run: a process a rank, each in a process group of its own.

    Args:
        options: of the command line, as in `strategy=fsdp2`.

    Attributes:
        began: seconds, of `time.monotonic`.
    """

    def __init__(self, recipe: Path, run: Path, world: int = 1, *options: str) -> None:
        arguments = ["train", str(recipe), f"run.dir={run}", *options]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        self.began = time.monotonic()
        self._logs = [run.with_name(f"{run.name}.rank{rank}.log") for rank in range(world)]
        self._ranks: list[Started] = []
        for rank, log in enumerate(self._logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._ranks.append(Started(arguments, os.environ | common | place, log))

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def alive(self) -> bool:
        """Whether no rank has ended."""
        return all(rank.poll() is None for rank in self._ranks)

    def kill(self) -> bool:
        """SIGKILL to the process group of each rank; whether all were still running."""
        alive = self.alive()
        for rank in self._ranks:
            rank.kill_group()
        codes = [rank.wait() for rank in self._ranks]
        return alive and all(code == -signal.SIGKILL for code in codes)

    def end(self) -> None:
        """Wait until it has ended as it should.

        Raises:
            RuntimeError: a rank ended with another code than 0, or time is over; with the end of its log.
        """
        deadline = time.monotonic() + PATIENCE_S
        try:
            for rank, log in zip(self._ranks, self._logs, strict=True):
                code: int | str = "no end"
                try:
                    code = rank.wait(max(0.1, deadline - time.monotonic()))
                finally:
                    if code != 0:
                        print(f"{log}: {code}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
                if code != 0:
                    raise RuntimeError(f"a rank ended with {code}; its log: {log.read_text(errors='replace')[-3000:]}")
        finally:
            self.kill()

    def kill_after(self, run: Path, step: int) -> int:
        """SIGKILL once the row of a step is there and a checkpoint is committed; the step of the last row."""
        deadline = time.monotonic() + PATIENCE_S
        while last_step(run) < step or committed(run) is None:
            if not self.alive():
                self.end()
                raise RuntimeError("it ended before it was killed")
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"step {step} never came")
            time.sleep(0.01)
        if not self.kill():
            raise RuntimeError("it ended before it was killed")
        return last_step(run)


def last_step(run: Path) -> int:
    """Of the last row of metrics; 0 without one."""
    metrics = run / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(metrics)), default=0) if metrics.exists() else 0


def committed(run: Path) -> int | None:
    """The step of the newest checkpoint that can be seen, by its name."""
    names = open_target(None, run).names()
    return int(names[0].removesuffix(".old").removeprefix("step-")) if names else None


def starts(run: Path) -> list[int]:
    """The step from which each start went on."""
    file = run / "starts.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


Seen = Counter[tuple[int, int, int, int]]


def seen(run: Path, steps: int) -> Seen:
    """How often each (step, epoch, sample, digest of its augmentation) was delivered, by all ranks of all launches.

    Steps that were only prepared, after the last, are left out.
    """
    found: Seen = Counter()
    for path in sorted(run.glob("samples-rank*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["step"] < steps:
                samples = zip(row["epoch"], row["sample"], row["parameters"], strict=True)
                found.update((row["step"], *sample) for sample in samples)
    return found


def epochs_are_whole(found: Seen, steps: int) -> bool:
    """Whether each step has a batch of distinct places, and each epoch but the last every sample once."""
    places = set(found)
    by_epoch: dict[int, list[int]] = {}
    for _, epoch, sample, _ in places:
        by_epoch.setdefault(epoch, []).append(sample)
    last = max(by_epoch)
    rows = {sample for samples in by_epoch.values() for sample in samples}
    return (
        Counter(step for step, *_ in places) == dict.fromkeys(range(steps), BATCH)
        and all(len(samples) == len(set(samples)) for samples in by_epoch.values())
        and all(set(samples) == rows for epoch, samples in by_epoch.items() if epoch < last)
        and last >= 1
    )


def measured(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics without what is of the machine."""
    return [_plain(row) for row in read_metrics(run / "metrics.jsonl")]


def measured_again(run: Path) -> list[dict[str, Any]]:
    """The rows that were dropped at a resumption, and measured again."""
    return [_plain(row) for back in read_rollbacks(run / "metrics.jsonl") for _, row in back.rows]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in _OF_THE_MACHINE and not key.startswith("system/")}
    # NaN is not equal to itself.
    return {key: "nan" if isinstance(value, float) and math.isnan(value) else value for key, value in kept.items()}


def state(run: Path, steps: int) -> dict[str, Tensor]:
    """All whole tensors of the last checkpoint, which must be that of the last step."""
    found = newest(open_target(None, run))
    if found is None or found.step != steps:
        raise RuntimeError(f"{run} has no whole checkpoint of step {steps}, but {found}")
    return read(found)


def other_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of tensors that differ in a bit, a dtype, a shape, or by not being there."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or _bits(found[name]) != _bits(expected[name])
    )


def _bits(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Difference:
    """What of a disturbed run is not as in an undisturbed one; nothing, if it is false.

    Attributes:
        tensors: names in the last checkpoint.
        rows: (step, column) of metrics, those that were dropped and measured again among them.
        samples: how many deliveries.
    """

    tensors: list[str]
    rows: list[tuple[int, str]]
    samples: int

    def __bool__(self) -> bool:
        return bool(self.tensors or self.rows or self.samples)

    def __str__(self) -> str:
        parts = [f"tensors {', '.join(self.tensors[:3])} ({len(self.tensors)})"] if self.tensors else []
        parts += [f"rows {self.rows[:3]} ({len(self.rows)})"] if self.rows else []
        parts += [f"{self.samples} samples"] if self.samples else []
        return "; ".join(parts) or "none"


def difference(run: Path, undisturbed: Path, steps: int) -> Difference:
    """Between two runs of one world size, to the bit."""
    expected = {row["step"]: row for row in measured(undisturbed)}
    rows = measured(run)
    wrong = [
        (row["step"], column)
        for row in rows + measured_again(run)
        for column in row.keys() | expected[row["step"]].keys()
        if row.get(column) != expected[row["step"]].get(column)
    ]
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        wrong.append((-1, "step"))
    ours, theirs = seen(run, steps), seen(undisturbed, steps)
    return Difference(
        other_tensors(state(run, steps), state(undisturbed, steps)), wrong, len(ours.keys() ^ theirs.keys())
    )


def loss_differences(run: Path, undisturbed: Path) -> list[float]:
    """Relative, of each row's loss, from the first step on."""
    rows = zip(measured(run), measured(undisturbed), strict=True)
    return [abs(row["loss"] - other["loss"]) / max(abs(other["loss"]), 1e-12) for row, other in rows]


def write_by_rename(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def machine() -> str:
    return f"{os.cpu_count()} cores, torch {torch.__version__}, gloo on loopback"
