"""The images a network is fine-tuned on, epoch after epoch in any order: held in memory where they are few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from medpretrain.evaluation.features import Batches
from medpretrain.evaluation.labelled import Labelled
from medpretrain.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from medpretrain.data.views import View

IN_MEMORY_BYTES = 2 << 30
"""Decoded images up to this size are kept: 2 GiB are 40,000 gray images of 112 x 112 pixels."""
_READ_AT_ONCE = 256


@dataclass
class TrainingImages:
    """The preprocessed images of one part.

    Attributes:
        part: which images.
        preprocessing: size, channels, mean and deviation.
        device: where they are delivered.
        threads: of the CPU, for decoding.
        batches: reads the images; medpretrain's own pipeline if left out.
        limit: bytes of decoded images that are kept in memory, on the device's side; more are decoded each time. The
            images are the same either way.
    """

    part: Labelled
    preprocessing: Preprocessing
    device: torch.device
    threads: int = 2
    batches: Batches | None = None
    limit: int = IN_MEMORY_BYTES
    _held: Tensor | None = field(default=None, init=False)

    @property
    def bytes(self) -> int:
        """Of all images, decoded, in float32."""
        return len(self.part) * self.preprocessing.channels * self.preprocessing.size**2 * 4

    def in_order(self, order_n: NDArray[np.int64], batch: int) -> Iterator[Tensor]:
        """The images at these places of the part: (n, C, S, S), n <= batch, whole and resized as features are.

        Raises:
            WorkFailed: an image does not decode.
        """
        if self.bytes > self.limit:
            yield from self._read(order_n, batch)
            return
        if self._held is None:
            self._held = torch.cat(list(self._read(np.arange(len(self.part)), _READ_AT_ONCE)))
        for places in torch.from_numpy(order_n).to(self._held.device).split(batch):
            yield self._held[places]

    def augmented(
        self, order_n: NDArray[np.int64], batch: int, view: View, *, seed: int, epoch: int
    ) -> Iterator[Tensor]:
        """As `in_order`, each image cropped and flipped as (seed, epoch, its row) say, decoded anew.

        Raises:
            WorkFailed: an image does not decode.
            UserError: the images are read by a reader that makes no crops.
        """
        # Here, for DALI is only needed where images are read.
        from medpretrain.data.augment import apply
        from medpretrain.data.pipeline import CropPipeline, Crops, DecodeError
        from medpretrain.data.views import draw

        if self.batches is not None:
            raise UserError("augmented images are read by medpretrain's own pipeline alone")
        dataset, how = self.part.dataset, self.preprocessing
        rows = self.part.rows_N[order_n]
        # DALI wants equal batches; the last is filled up and cut.
        padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch)])
        chunks = padded.reshape(-1, batch)
        drawn = [
            draw(
                view,
                seed=seed,
                epoch=np.full(batch, epoch),
                sample=some,
                name="finetune",
                number=0,
                size=dataset.sizes[some],
                channels=how.channels,
                center=float(np.mean(how.mean)),
            )
            for some in chunks
        ]

        def feeds() -> Iterator[Any]:
            for some, chosen in zip(chunks, drawn, strict=True):
                yield dataset.read(some), dataset.sizes[some], [Crops(chosen.start, chosen.end, chosen.flip)]

        pipeline = CropPipeline(
            feeds(),
            sizes=[view.size],
            batch=batch,
            channels=how.channels,
            bit_depth=dataset.bit_depth,
            device=self.device,
            threads=self.threads,
            ahead=2,
        )
        mean, std = torch.tensor(how.mean, device=self.device), torch.tensor(how.std, device=self.device)
        left = len(rows)
        try:
            for (images,), chosen in zip(pipeline, drawn, strict=True):
                yield apply(images, view, chosen, mean, std)[:left]
                left -= batch
        except (DecodeError, OSError):
            for _ in self._read(order_n, batch):  # finds which image it is, and says so
                pass
            raise

    def _read(self, order_n: NDArray[np.int64], batch: int) -> Iterator[Tensor]:
        batches: Any = self.batches
        if batches is None:
            from medpretrain.data.batches import plain_batches

            batches = plain_batches
        how = self.preprocessing
        options = {} if self.batches is not None else {"threads": self.threads}
        images: Iterator[Tensor] = batches(
            self.part.dataset,
            self.part.rows_N[order_n],
            size=how.size,
            channels=how.channels,
            mean=list(how.mean),
            std=list(how.std),
            batch=batch,
            device=self.device,
            **options,
        )
        yield from images
