"""From datasets and a step number to the tensors a method sees."""

from __future__ import annotations

import json
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.dataset import Dataset
from data_prep.errors import UserError, WorkFailed
from medpretrain.data.augment import apply
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import Places, SampleSequence
from medpretrain.data.pipeline import CropPipeline, Crops, DecodeError, Feed, undecodable, whole
from medpretrain.data.replace import Replacements, faults
from medpretrain.data.views import Augmentation, Parameters, View, draw

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
        samples: which image of the training split each of the global batch is, (size,) int64; also where it does not
            decode and another with the same labels is seen in its place.
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
        trace: a file to which epoch, row (numbered through the datasets) and parameter digest of every sample that
            comes out of the pipeline are appended; and where one was replaced, which rows would have been seen.
        replace_limit: how many samples that do not decode this stream replaces; the batch with the next raises
            WorkFailed.
        replaced: a file to which each of them is appended.

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
        replace_limit: int = 0,
        replaced: Path | None = None,
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
        ids = {name: dataset.labels(name) for name in labels}
        self._labels = {name: torch.from_numpy(column) for name, column in ids.items()}
        self._replacements = Replacements(
            dataset,
            self._rows,
            np.stack([np.zeros_like(self._rows), *(column[self._rows] for column in ids.values())]),
            partial(undecodable, channels=channels, bit_depth=dataset.bit_depth, device=device),
            replace_limit,
            replaced,
        )

    @property
    def steps_per_epoch(self) -> float:
        """An epoch is as many samples as the datasets hold together; with weights, however often each is seen in it.
        Where classes are under-sampled, it is as many as are seen at all."""
        return len(self) / self.global_batch

    def __len__(self) -> int:
        return self.order.epoch_size

    @property
    def replaced(self) -> int:
        """How many samples did not decode so far."""
        return len(self._replacements)

    @property
    def all_labels(self) -> dict[str, Tensor]:
        """For each label kind the ids of all images of the split, (N,), -1 where unknown."""
        return {name: ids[self._rows].to(self._device) for name, ids in self._labels.items()}

    def batches(self, start: int) -> Generator[Batch]:
        """The batches of steps start, start + 1, ..., without end, prepared in advance."""
        return prefetched(self._batches(start), self._prefetch)

    def parameters(self, places: Places, rows: NDArray[np.int64]) -> list[tuple[Augmentation, Parameters]]:
        """The augmentation of each view of the samples at `places`, in the order in which views are made."""
        size = self.dataset.sizes[rows]
        center = float(np.mean(self._mean))
        return [
            (
                view.of(number),
                draw(
                    view.of(number),
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
        first = share.rank * (self.global_batch // share.world)
        micro: list[Views] = []
        step = start
        for views in self._micro_batches(start * share.micro_batches):
            micro.append(views)
            if len(micro) == share.micro_batches:
                samples = self.order.step(step, self.global_batch).sample
                labels = {name: ids[self._rows[samples]].to(self._device) for name, ids in self._labels.items()}
                numbers = torch.from_numpy(samples).to(self._device)
                yield Batch(step, self.seed, self.global_batch, first, micro, labels, numbers)
                micro, step = [], step + 1

    def _micro_batches(self, micro_step: int) -> Iterator[Views]:
        """This rank's parts of global batches, from one on.

        Where an image does not decode, all that was prepared is thrown away and made anew from that part on, with
        another image in its place.
        """
        mean, std = _per_channel(self._mean, self._device), _per_channel(self._std, self._device)
        with self._trace.open("a") if self._trace else nullcontext() as trace:
            while True:
                planned: deque[_Planned] = deque()  # what went into the pipeline and has not come out
                try:
                    for crops in self._pipeline(micro_step, planned):
                        plan = planned.popleft()
                        if trace is not None:
                            trace.write(plan.line() + "\n")
                            trace.flush()
                        chosen = zip(crops, plan.parameters, strict=True)
                        made = [apply(crop, view, parameters, mean, std) for crop, (view, parameters) in chosen]
                        yield _by_name(made, self.views)
                        micro_step += 1
                except DecodeError:
                    # All of them: DALI does not promise that the error comes with the batch that has the image.
                    if not sum(self._replacements.inspect(plan.seen, plan.step) for plan in planned):
                        raise

    def _pipeline(self, first: int, planned: deque[_Planned]) -> CropPipeline:
        """The micro-batches of this rank from one on; what is fed is appended to `planned`."""
        share = self._share
        local = self.global_batch // share.world
        part = local // share.micro_batches

        def feeds() -> Iterator[Feed]:
            for micro_step in _count(first):
                step, turn = divmod(micro_step, share.micro_batches)
                places = self.order.places(step * self.global_batch + share.rank * local + turn * part, part)
                rows = self._rows[places.sample]
                seen, images = self._replacements.read(rows, step)
                plan = _Planned(step, places.epoch, rows, seen, self.parameters(places, seen))
                planned.append(plan)
                crops = [Crops(chosen.start, chosen.end, chosen.flip) for _, chosen in plan.parameters]
                yield images, self.dataset.sizes[seen], crops

        return CropPipeline(
            feeds(),
            sizes=[view.size for view in self.views.values() for _ in range(view.count)],
            batch=part,
            channels=self._channels,
            bit_depth=self.dataset.bit_depth,
            device=self._device,
            threads=self._threads,
            ahead=2,
        )


@dataclass(frozen=True)
class _Planned:
    """A micro-batch on its way: the rows whose turn it is, those that are seen, and how each view is made."""

    step: int
    epoch: NDArray[np.int64]
    rows: NDArray[np.int64]
    seen: NDArray[np.int64]
    parameters: list[tuple[Augmentation, Parameters]]

    def line(self) -> str:
        digest = np.bitwise_xor.reduce([chosen.digest() for _, chosen in self.parameters])
        line = {"step": self.step, "epoch": self.epoch.tolist(), "sample": self.seen.tolist()}
        line["parameters"] = digest.tolist()
        return json.dumps(line if (self.rows == self.seen).all() else line | {"in_place_of": self.rows.tolist()})


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
    """The images of `rows` in order, resized to size x size and normalised: (n, C, size, size), n <= batch.

    Raises:
        WorkFailed: an image does not decode. None is replaced here: what is measured is of all the images.
    """

    def feeds() -> Iterator[Feed]:
        for first in range(0, len(rows), batch):
            some = rows[first : first + batch]
            padded = np.concatenate([some, np.repeat(some[-1:], batch - len(some))])  # DALI wants equal batches
            yield dataset.read(padded), dataset.sizes[padded], [whole(batch)]

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
    try:
        for (images,) in pipeline:
            yield images[:left].sub_(shift[:, None, None]).div_(scale[:, None, None])
            left -= batch
    except (DecodeError, OSError):
        decoder = partial(undecodable, channels=channels, bit_depth=dataset.bit_depth, device=device)
        ahead = rows[len(rows) - left :][: 4 * batch]  # what may have been in the pipeline
        for row, why in faults(dataset, ahead, decoder).items():
            shard, key = dataset.sample_name(row)
            raise WorkFailed(
                f"image {key} of {dataset.path}/shards/{shard} does not decode ({why}), and none is left out or "
                "replaced where something is measured; "
                f"'medpretrain prep verify {dataset.path}' finds all that are damaged"
            ) from None
        raise


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
