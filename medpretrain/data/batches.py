"""From datasets and a step number to the tensors a method sees."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.data.augment import apply
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import Places, SampleSequence
from medpretrain.data.pipeline import CropPipeline, Crops, Feed
from medpretrain.data.views import Parameters, View, draw

Views = dict[str, list[Tensor]]
"""A list of (n, C, S, S) tensors for each kind of view."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch of a step.

    Args:
        step: counted from 0.
        seed: the run's; with the step it names whatever else a method draws.
        size: images in the global batch.
        first: where this rank's images begin in it.
        micro: the images of this rank, in equal parts, each a forward pass.
        labels: for each label kind the ids of the whole global batch, (size,) int64, -1 where unknown: known to every
            rank without a word between them.
        samples: which image of the training split each of the global batch is, (size,) int64.
    """

    step: int
    seed: int
    size: int
    first: int
    micro: list[Views]
    labels: Mapping[str, Tensor]
    samples: Tensor


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes: `rank` of `world`, in `micro_batches` equal parts."""

    rank: int = 0
    world: int = 1
    micro_batches: int = 1


class Stream:
    """The batches of a run from any step on; a batch is a function of the step alone.

    Args:
        split: the split whose samples are seen.
        mean, std: a value a channel, of intensities in 0..1.
        views: the kinds of views a method asks for.
        labels: the label kinds that travel with a batch.
        share: this process's part.
        order: which samples stand where, instead of a shuffle of the split.
        trace: a file to which epoch, row (numbered through the datasets) and parameter digest of every sample that goes
            into the pipeline are appended.

    Raises:
        UserError: fewer samples than the global batch, weights that it cannot hold, a global batch that the share does
            not divide, an unknown label.
    """

    def __init__(
        self,
        dataset: Mixture,
        views: Mapping[str, View],
        *,
        split: str,
        seed: int,
        global_batch: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        threads: int,
        labels: Sequence[str] = (),
        block_shards: int = 0,
        share: Share | None = None,
        prefetch: int = 2,
        order: SampleSequence | None = None,
        trace: Path | None = None,
    ) -> None:
        self.dataset, self.views, self.seed, self.global_batch = dataset, dict(views), seed, global_batch
        self._share = share or Share()
        self._channels, self._device, self._threads, self._prefetch = channels, device, threads, prefetch
        self._mean, self._std, self._trace = mean, std, trace
        self._rows = dataset.rows(split)
        self.order = order or dataset.order(split, seed=seed, global_batch=global_batch, block_shards=block_shards)
        parts = self._share.world * self._share.micro_batches
        if global_batch % parts:
            raise UserError(
                f"train.global_batch={global_batch} is not divisible by {self._share.world} processes x "
                f"{self._share.micro_batches} micro-batches"
            )
        self._labels = {name: torch.from_numpy(dataset.labels(name)) for name in labels}

    @property
    def steps_per_epoch(self) -> float:
        """An epoch is as many samples as the datasets hold together; with weights, however often each is seen in it.
        Where classes are under-sampled, it is as many as are seen at all."""
        return len(self) / self.global_batch

    def __len__(self) -> int:
        return self.order.epoch_size

    @property
    def all_labels(self) -> dict[str, Tensor]:
        """For each label kind the ids of all images of the split, (N,), -1 where unknown."""
        return {name: ids[self._rows].to(self._device) for name, ids in self._labels.items()}

    def batches(self, start: int) -> Generator[Batch]:
        """The batches of steps start, start + 1, ..., without end, prepared in advance."""
        return prefetched(self._batches(start), self._prefetch)

    def parameters(self, places: Places, rows: NDArray[np.int64]) -> list[tuple[View, Parameters]]:
        """The augmentation of each view of the samples at `places`, in the order in which views are made."""
        size = self.dataset.sizes[rows]
        center = float(np.mean(self._mean))
        return [
            (
                view,
                draw(
                    view,
                    seed=self.seed,
                    epoch=places.epoch,
                    sample=places.sample,
                    name=name,
                    number=number,
                    size=size,
                    channels=self._channels,
                    center=center,
                ),
            )
            for name, view in self.views.items()
            for number in range(view.count)
        ]

    def _batches(self, start: int) -> Iterator[Batch]:
        share = self._share
        local = self.global_batch // share.world
        part = local // share.micro_batches
        planned: queue.SimpleQueue[list[tuple[View, Parameters]]] = queue.SimpleQueue()
        trace = self._trace.open("a") if self._trace else None

        def feeds() -> Iterator[Feed]:
            for micro_step in _count(start * share.micro_batches):
                step, turn = divmod(micro_step, share.micro_batches)
                places = self.order.places(step * self.global_batch + share.rank * local + turn * part, part)
                rows = self._rows[places.sample]
                parameters = self.parameters(places, rows)
                planned.put(parameters)
                if trace is not None:
                    digest = np.bitwise_xor.reduce([chosen.digest() for _, chosen in parameters])
                    row = {"step": step, "epoch": places.epoch.tolist(), "sample": rows.tolist()}
                    trace.write(json.dumps({**row, "parameters": digest.tolist()}) + "\n")
                    trace.flush()
                crops = [Crops(chosen.start, chosen.end, chosen.flip) for _, chosen in parameters]
                yield self.dataset.read(rows), crops

        pipeline = CropPipeline(
            feeds(),
            sizes=[view.size for view in self.views.values() for _ in range(view.count)],
            batch=part,
            channels=self._channels,
            bit_depth=self.dataset.bit_depth,
            device=self._device,
            threads=self._threads,
            ahead=2,
        )
        mean, std = _per_channel(self._mean, self._device), _per_channel(self._std, self._device)
        micro: list[Views] = []
        step = start
        for crops in pipeline:
            chosen = zip(crops, planned.get(), strict=True)
            made = [apply(crop, view, parameters, mean, std) for crop, (view, parameters) in chosen]
            micro.append(_by_name(made, self.views))
            if len(micro) == share.micro_batches:
                samples = self.order.step(step, self.global_batch).sample
                labels = {name: ids[self._rows[samples]].to(self._device) for name, ids in self._labels.items()}
                numbers = torch.from_numpy(samples).to(self._device)
                yield Batch(step, self.seed, self.global_batch, share.rank * local, micro, labels, numbers)
                micro, step = [], step + 1


def plain_batches(
    dataset: Dataset,
    rows: NDArray[np.int64],
    *,
    size: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    device: torch.device,
    threads: int = 2,
) -> Iterator[Tensor]:
    """The images of `rows` in order, resized to size x size and normalised: (n, C, size, size), n <= batch."""
    whole = Crops(
        np.zeros((batch, 2), dtype=np.float32), np.ones((batch, 2), dtype=np.float32), np.zeros(batch, dtype=np.bool_)
    )

    def feeds() -> Iterator[Feed]:
        for first in range(0, len(rows), batch):
            some = rows[first : first + batch]
            padded = np.concatenate([some, np.repeat(some[-1:], batch - len(some))])  # DALI wants equal batches
            yield dataset.read(padded), [whole]

    pipeline = CropPipeline(
        feeds(),
        sizes=[size],
        batch=batch,
        channels=channels,
        bit_depth=dataset.bit_depth,
        device=device,
        threads=threads,
        ahead=2,
    )
    shift, scale = _per_channel(mean, device), _per_channel(std, device)
    left = len(rows)
    for (images,) in pipeline:
        yield images[:left].sub_(shift[:, None, None]).div_(scale[:, None, None])
        left -= batch


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=device)


def _by_name(made: list[Tensor], views: Mapping[str, View]) -> Views:
    rest = iter(made)
    return {name: [next(rest) for _ in range(view.count)] for name, view in views.items()}


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


Item = TypeVar("Item")


def prefetched(items: Iterator[Item], depth: int) -> Generator[Item]:
    """The same items, made by a thread up to `depth` ahead; its error is raised where the item would have been."""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if stop.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stop.set()
        thread.join()
