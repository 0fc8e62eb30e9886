"""Features of a dataset's images from a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError, WorkFailed
from medpretrain.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from data_prep.dataset import Dataset
    from medpretrain.evaluation.source import Source
    from medpretrain.training.process import Process

_LARGEST_BATCH = 256
# A batch's pixels: on a CPU as few as its caches like, on a GPU as many as keep it busy.
_BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**24}
# From this size on convolutions take up to a fifth less time with channels last; at 64 pixels a fifth more.
_CHANNELS_LAST_FROM = 160

_log = logging.getLogger(__name__)


class Batches(Protocol):
    """How `medpretrain.data.batches.plain_batches` is called."""

    def __call__(
        self,
        dataset: Dataset,
        rows: NDArray[np.int64],
        *,
        size: int,
        channels: int,
        mean: list[float],
        std: list[float],
        batch: int,
        device: torch.device,
    ) -> Iterable[Tensor]:
        """Images (n, channels, size, size), float32, normalised, in the order of the rows."""


def features(
    source: Source, dataset: Dataset, rows: NDArray[np.int64], *, process: Process, cache: Path | None
) -> NDArray[np.float32]:
    """Features (len(rows), D), float32, in the order of the rows; all of them on every rank.

    Each rank takes an equal run of the rows, so features of any number of ranks are equal but for float32's rounding.
    Ask once for all the rows that an evaluation needs: what is kept is kept for exactly these rows.

    Args:
        source: what computes them; left as it is.
        dataset: where the images are.
        rows: which of them, at least one; the same on every rank.
        process: this one of those that share the work; all must call.
        cache: a folder in which they are kept, or were (see `feature_cache`); None: nothing is kept.

    Raises:
        UserError: no row; images the network cannot take; features that are not finite, naming the first image.
        WorkFailed: an image does not decode. An error of one rank ends all.
    """
    # Here, for the reader of images is only needed where images are read.
    from medpretrain.evaluation import feature_cache
    from medpretrain.evaluation.source import conversion

    if not len(rows):
        raise UserError("there is no image to take features of")
    converted = conversion(source.preprocessing, dataset)
    if converted is not None and process.leads:
        _log.warning("%s: %s sees %s", dataset.path, source.name, converted)
    key = feature_cache.cache_key(source.sha256, dataset.sha256, rows, process.device)
    kept: NDArray[np.float32] | None = None

    def look() -> tuple[int, int] | None:
        nonlocal kept
        if cache is not None:
            feature_cache.prepare(cache)
            kept = feature_cache.load(cache, key, len(rows))
        return None if kept is None else (len(kept), kept.shape[1])

    shape = process.agreed(look)
    if shape is not None:
        return _from_first(kept, shape, process)
    found = _shared(source, dataset, rows, process)
    _refuse_not_finite(found, dataset, rows)
    if cache is not None and process.leads:
        feature_cache.store(cache, key, found)
    return found


def extract(
    backbone: nn.Module,
    dataset: Dataset,
    rows: NDArray[np.int64],
    preprocessing: Preprocessing,
    *,
    device: torch.device | str,
    batch: int | None = None,
    batches: Batches | None = None,
) -> NDArray[np.float32]:
    """Features (len(rows), D) in the order of the rows, by this process alone.

    The backbone is moved to the device, laid out for speed and put into eval mode, and stays so. Images are read and
    decoded while it computes.

    Args:
        backbone: maps (n, C, S, S) to (n, D).
        dataset: where the images are.
        rows: which of them, at least one.
        preprocessing: what the backbone was trained with.
        device: where the backbone runs.
        batch: images at once, at most; left out, what suits device and image size.
        batches: reads the images; medpretrain's own pipeline if left out.

    Raises:
        UserError: no row.
    """
    if not len(rows):
        raise UserError("there is no image to take features of")
    if batches is None:
        from medpretrain.data.batches import plain_batches

        batches = plain_batches
    device = torch.device(device)
    if batch is None:
        batch = min(_LARGEST_BATCH, max(8, _BATCH_PIXELS.get(device.type, 2**18) // preprocessing.size**2))
    batch = -(-len(rows) // -(-len(rows) // batch))  # as many batches, all alike: the last is not filled up for nothing
    large = preprocessing.size >= _CHANNELS_LAST_FROM
    layout = torch.channels_last if large else torch.contiguous_format
    backbone.to(device).eval().to(memory_format=layout)
    images = batches(
        dataset,
        rows,
        size=preprocessing.size,
        channels=preprocessing.channels,
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
        batch=batch,
        device=device,
    )
    found: list[NDArray[np.float32]] = []
    waiting: Tensor | None = None
    with torch.inference_mode():
        for part in images:
            computed = backbone(part.to(device, memory_format=layout)).float()
            if waiting is not None:  # fetched only now: a GPU already has the next batch to compute
                found.append(waiting.cpu().numpy())
            waiting = computed
        assert waiting is not None
        found.append(waiting.cpu().numpy())
    features: NDArray[np.float32] = np.concatenate(found)
    assert features.ndim == 2, f"features of shape {features.shape}, not (n, D)"
    assert len(features) == len(rows), f"{len(features)} features of {len(rows)} rows"
    return features


def _shared(source: Source, dataset: Dataset, rows: NDArray[np.int64], process: Process) -> NDArray[np.float32]:
    """Each rank's part computed by it, and all parts on every rank."""
    from medpretrain.data.batches import plain_batches

    bounds = [rank * len(rows) // process.world for rank in range(process.world + 1)]
    own = rows[bounds[process.rank] : bounds[process.rank + 1]]
    part: NDArray[np.float32] | None = None
    failure: Exception | None = None
    try:
        if len(own):
            with _threads(process):
                part = extract(
                    source.network(),
                    dataset,
                    own,
                    source.preprocessing,
                    device=process.device,
                    batches=partial(plain_batches, threads=process.cores),
                )
    except Exception as error:
        if process.world == 1:
            raise
        failure = error
    if process.world == 1:
        assert part is not None
        return part
    width = _agree_to_go_on(failure, 0 if part is None else part.shape[1], process)
    counts = np.diff(bounds).tolist()
    padded = torch.zeros(max(counts), width, device=process.device)
    if part is not None:
        padded[: len(part)] = torch.from_numpy(part)
    gathered = [torch.empty_like(padded) for _ in range(process.world)]
    dist.all_gather(gathered, padded)
    return np.concatenate([one[:count].cpu().numpy() for one, count in zip(gathered, counts, strict=True)])


def _agree_to_go_on(failure: Exception | None, width: int, process: Process) -> int:
    """Tell every rank whether this one failed, and how wide its features are; the first failure is raised on all."""
    plain = failure
    if failure is not None and not isinstance(failure, (ValueError, OSError, WorkFailed)):
        plain = WorkFailed(f"process {process.rank}: {type(failure).__name__}: {failure}")
    told: list[tuple[Exception | None, int]] = [(None, 0)] * process.world
    dist.all_gather_object(told, (plain, width))
    if failure is not None:
        raise failure
    for other, _ in told:
        if other is not None:
            raise other
    return max(width for _, width in told)


def _from_first(kept: NDArray[np.float32] | None, shape: tuple[int, int], process: Process) -> NDArray[np.float32]:
    """What rank 0 has, on every rank."""
    if process.world == 1:
        assert kept is not None
        return kept
    tensor = torch.empty(shape) if kept is None else torch.from_numpy(kept)
    tensor = tensor.to(process.device)
    dist.broadcast(tensor, src=0)
    return tensor.cpu().numpy()


@contextmanager
def _threads(process: Process) -> Iterator[None]:
    """This process's share of the cores for the network; torchrun would leave it one."""
    before = torch.get_num_threads()
    torch.set_num_threads(process.cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_not_finite(features_ND: NDArray[np.float32], dataset: Dataset, rows: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(~np.isfinite(features_ND).all(axis=1))
    if len(bad):
        shard, key = dataset.sample_name(int(rows[bad[0]]))
        raise UserError(
            f"the features of {len(bad)} of {len(rows)} images of {dataset.path} are not finite, the first of them of "
            f"image {key} of {shard}; nothing is measured without them: evaluate an earlier checkpoint"
        )
