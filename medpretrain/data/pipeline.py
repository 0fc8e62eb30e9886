"""The DALI pipeline: it decodes and crops what it is told to, and decides nothing itself."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor


@dataclass(frozen=True)
class Crops:
    """One view of n images as the pipeline needs it: relative (y, x) corners (n, 2), flips (n,)."""

    start: NDArray[np.float32]
    end: NDArray[np.float32]
    flip: NDArray[np.bool_]


Feed = tuple[Sequence[NDArray[np.uint8]], NDArray[np.int32], Sequence[Crops]]
"""The encoded images of a batch, their heights and widths (n, 2), and the crops of each view."""


class DecodeError(RuntimeError):
    """An image of a batch does not decode, or not to its size; which one is not known."""


class CropPipeline:
    """Encoded images and crop boxes in, float32 crops in 0..1 out; the same definition on CPU and GPU.

    Args:
        feeds: the batches. A feed is pulled some batches ahead.
        sizes: the pixels a side of each view.
        batch: images a feed.
        channels: 1 or 3; gray images become three equal channels, colour ones their luma.
        bit_depth: 8, or 16 for PNG and TIFF that hold 16 bits, which are kept.
        device: where the crops are made and delivered.
        threads: of the CPU.
        ahead: how many batches DALI prepares in advance.
    """

    def __init__(
        self,
        feeds: Iterator[Feed],
        *,
        sizes: Sequence[int],
        batch: int,
        channels: int,
        bit_depth: int,
        device: torch.device,
        threads: int,
        ahead: int,
    ) -> None:
        assert channels in (1, 3)
        assert bit_depth in (8, 16)
        self._sizes, self._batch, self._channels, self._device = tuple(sizes), batch, channels, device
        on_gpu = device.type == "cuda"
        self._expected: deque[NDArray[np.int32]] = deque()  # the sizes of the images of what DALI was fed
        self._pipeline = Pipeline(
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=ahead,
        )
        with self._pipeline:
            encoded, *parameters = fn.external_source(
                source=(self._flatten(feed) for feed in feeds), num_outputs=1 + 3 * len(self._sizes), batch=True
            )
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if channels == 1 else types.RGB,
                dtype=types.UINT16 if bit_depth == 16 else types.UINT8,
                adjust_orientation=False,  # preparation has turned every image upright
            )
            crops = []
            for view, size in enumerate(self._sizes):
                start, end, flip = parameters[3 * view : 3 * view + 3]
                crop = fn.resize(
                    images,
                    size=(size, size),
                    roi_start=start,
                    roi_end=end,
                    roi_relative=True,
                    antialias=True,
                    interp_type=types.INTERP_LINEAR,
                    dtype=types.FLOAT if bit_depth == 16 else types.UINT8,
                )
                crops.append(
                    fn.crop_mirror_normalize(
                        crop,
                        mirror=flip,
                        mean=[0.0] * channels,
                        std=[2.0**bit_depth - 1] * channels,
                        dtype=types.FLOAT,
                        output_layout="CHW",
                    )
                )
            self._pipeline.set_outputs(images.shape(), *crops)
        self._pipeline.build()

    def __iter__(self) -> Iterator[list[Tensor]]:
        """For each feed one (n, C, S, S) tensor a view, the caller's own; ends when the feeds end.

        Raises:
            DecodeError: as it says; the pipeline is of no further use.
        """
        while True:
            try:
                shapes, *outputs = self._pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                reason = _fault_of_an_image(error)
                if reason is None:
                    raise
                raise DecodeError(reason) from error
            for found, expected in zip(shapes.as_array()[:, :2], self._expected.popleft(), strict=True):
                if (found != expected).any():
                    raise DecodeError(f"it has {_pixels(found)} pixels, and the index says {_pixels(expected)}")
            yield [self._own(output, size) for output, size in zip(outputs, self._sizes, strict=True)]

    def _own(self, output: Any, size: int) -> Tensor:
        dense = output.as_tensor()
        tensor = torch.empty(dense.shape(), dtype=torch.float32, device=self._device)
        assert tensor.shape[1:] == (self._channels, size, size)
        if self._device.type == "cuda":
            feed_ndarray(dense, tensor, cuda_stream=torch.cuda.current_stream(self._device))
        else:
            feed_ndarray(dense, tensor)
        return tensor

    def _flatten(self, feed: Feed) -> tuple[Any, ...]:
        images, sizes, views = feed
        self._expected.append(sizes)
        flat: list[Any] = [list(images)]
        for crops in views:
            flat += [crops.start, crops.end, crops.flip.astype(np.int32)]
        return tuple(flat)


def whole(count: int) -> Crops:
    """The whole of each image, not flipped."""
    return Crops(
        np.zeros((count, 2), dtype=np.float32), np.ones((count, 2), dtype=np.float32), np.zeros(count, dtype=np.bool_)
    )


def undecodable(
    images: Sequence[NDArray[np.uint8]],
    sizes: NDArray[np.int32],
    *,
    channels: int,
    bit_depth: int,
    device: torch.device,
) -> dict[int, str]:
    """Which images do not decode by themselves, by the same decoder, and why, in one line; sizes as in `Feed`."""
    faults: dict[int, str] = {}
    next_one = 0
    while next_one < len(images):
        feeds = [([image], size[None], [whole(1)]) for image, size in zip(images, sizes, strict=True)]
        pipeline = CropPipeline(
            iter(feeds[next_one:]),
            sizes=[8],
            batch=1,
            channels=channels,
            bit_depth=bit_depth,
            device=device,
            threads=1,
            ahead=1,
        )
        try:
            for _ in pipeline:
                next_one += 1
        except DecodeError as error:
            faults[next_one] = str(error)
            next_one += 1
    return faults


# What DALI throws is always a RuntimeError; only its text tells whose fault it is.
_IN_THE_DECODER = re.compile(r"fn\.decoders\.image\b.*?encountered:\s*(.*)", re.DOTALL)
_NOT_THE_IMAGE = re.compile(r"memory|alloc|\bcuda\b|cudaError", re.IGNORECASE)


def _fault_of_an_image(error: RuntimeError) -> str | None:
    """In one line what the decoder says of an image; None where something else failed."""
    found = _IN_THE_DECODER.search(str(error)) if type(error) is RuntimeError else None
    if found is None or _NOT_THE_IMAGE.search(found[1]):
        return None
    return f"the decoder says: {found[1].splitlines()[0].strip(' :')}"


def _pixels(size: NDArray[np.int32]) -> str:
    return f"{size[1]} x {size[0]}"
