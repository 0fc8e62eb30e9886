"""Features of a dataset's images from a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from medpretrain.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from data_prep.dataset import Dataset


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


def extract(
    backbone: nn.Module,
    dataset: Dataset,
    rows: NDArray[np.int64],
    preprocessing: Preprocessing,
    *,
    device: torch.device | str,
    batch: int = 256,
    batches: Batches | None = None,
) -> NDArray[np.float32]:
    """Features (len(rows), D) in the order of the rows.

    The backbone is moved to the device and put into eval mode, and stays so.

    Args:
        backbone: maps (n, C, S, S) to (n, D).
        dataset: where the images are.
        rows: which of them, at least one.
        preprocessing: what the backbone was trained with.
        device: where the backbone runs.
        batch: images at once.
        batches: reads the images; medpretrain's own pipeline if left out.

    Raises:
        UserError: no row.
    """
    if not len(rows):
        raise UserError("there is no image to take features of")
    if batches is None:
        # Here, for DALI is only needed where images are read.
        from medpretrain.data.batches import plain_batches

        batches = plain_batches
    device = torch.device(device)
    backbone.to(device).eval()
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
    with torch.inference_mode():
        parts = [backbone(part.to(device)).float().cpu().numpy() for part in images]
    features: NDArray[np.float32] = np.concatenate(parts)
    assert features.ndim == 2, f"features of shape {features.shape}, not (n, D)"
    assert len(features) == len(rows), f"{len(features)} features of {len(rows)} rows"
    return features
