"""An embedding of every training image, for methods that place prototypes or find sub-classes by them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from medpretrain.data.batches import Stream
from medpretrain.losses.gather import gather
from medpretrain.methods.base import Method, Progress
from medpretrain.models.batchnorm import statistics_kept

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surveyor:
    """Shows a method all training images, unaugmented, when it asks for them.

    Args:
        open_stream: the images in the order of their numbers, each once, as one view named `whole`.
        precision: `fp32` or `bf16`.
        on_batch: told the step at each batch, for a survey takes long.
    """

    open_stream: Callable[[], Stream]
    precision: str
    on_batch: Callable[[int], None] = lambda step: None

    def before_step(self, method: Method, progress: Progress) -> None:
        """A survey, if the method wants one; a collective."""
        if method.wants_survey(progress):
            stream = self.open_stream()
            _log.info("step %d: embedding all %d training images", progress.step, len(stream))
            method.survey(self._embeddings(method, stream, progress.step), stream.all_labels)

    @torch.no_grad()
    def _embeddings(self, method: Method, stream: Stream, step: int) -> Tensor:
        """(N, D), the same on every rank.

        BatchNorm takes the statistics of each batch and records none: at the first step it has no others.
        """
        parts: list[Tensor] = []
        images = len(stream)
        batches = stream.batches(0)
        modes = {layer: layer.training for layer in method.modules()}
        for layer in modes:
            layer.training = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        try:
            with statistics_kept(method):
                for batch in islice(batches, math.ceil(images / stream.global_batch)):
                    self.on_batch(step)
                    views = [part["whole"][0] for part in batch.micro]
                    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                        mine = [method.embed(view) for view in views]
                    parts.append(gather(torch.cat(mine).float()))
        finally:
            batches.close()
            for layer, was in modes.items():
                layer.training = was
        return torch.cat(parts)[:images]
