"""Pictures of what a network saw: images, their views, and where its class token looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.dataset import Dataset
from medpretrain.data.batches import plain_batches
from medpretrain.data.views import View
from medpretrain.evaluation.attention import class_attention, why_no_attention
from medpretrain.evaluation.augmented import augmented
from medpretrain.evaluation.space_record import Picture
from medpretrain.models.preprocessing import Preprocessing

VIEWS_SHOWN = 4
_BATCH = 16
_COLOURS = "inferno"

Pixels = NDArray[np.uint8]
Pictures = list[tuple[Picture, Pixels]]


def images_of(dataset: Dataset, rows: Sequence[int], preprocessing: Preprocessing, device: torch.device) -> Pictures:
    """Each image once, at the size and in the channels in which a network with this preprocessing sees it."""
    once = np.unique(np.asarray(rows, np.int64))
    return [
        (Picture(file=f"row-{row}.png", kind="image", row=row, number=None), pixels)
        for row, pixels in zip(once.tolist(), _whole(dataset, once, preprocessing, device), strict=True)
    ]


def views_of(
    dataset: Dataset,
    rows: Sequence[int],
    view: View,
    preprocessing: Preprocessing,
    *,
    views: int,
    seed: int,
    device: torch.device,
) -> Pictures:
    """The first views of each image, the very ones that `augmented` gives for this seed."""
    shown, found = min(views, VIEWS_SHOWN), []
    some = np.asarray(rows, np.int64)
    batches = augmented(dataset, some, view, preprocessing, views=shown, seed=seed, device=device, batch=_BATCH)
    made_VCSS = (of_image for batch in batches for of_image in batch)
    for row, one_VCSS in zip(some.tolist(), made_VCSS, strict=True):
        for number, one_CSS in enumerate(one_VCSS):
            picture = Picture(file=f"row-{row}-view-{number}.png", kind="view", row=row, number=number)
            found.append((picture, _pixels(one_CSS, preprocessing)))
    return found


def attention_of(
    dataset: Dataset, rows: Sequence[int], backbone: nn.Module, preprocessing: Preprocessing, device: torch.device
) -> Pictures:
    """Attention of the class token over each image, its mean over heads and each head's own; none of a network without.

    Black is none and bright the most of that map, mixed with the image: where attention is even, so is the picture.
    """
    found: Pictures = []
    if why_no_attention(backbone) is not None:
        return found
    some = np.asarray(rows, np.int64)
    for start, batch in zip(range(0, len(some), _BATCH), _batches(dataset, some, preprocessing, device), strict=True):
        maps_nHSS = class_attention(backbone, batch).enlarged(preprocessing.size).cpu().numpy()
        for row, image_CSS, maps_HSS in zip(some[start:].tolist(), batch, maps_nHSS, strict=False):
            under = _pixels(image_CSS, preprocessing)
            for number, map_SS in [(None, maps_HSS.mean(axis=0)), *enumerate(maps_HSS)]:
                name = "mean" if number is None else number
                picture = Picture(file=f"row-{row}-attention-{name}.png", kind="attention", row=row, number=number)
                found.append((picture, _over(under, map_SS)))
    return found


def _batches(
    dataset: Dataset, rows: NDArray[np.int64], preprocessing: Preprocessing, device: torch.device
) -> Iterator[Tensor]:
    return plain_batches(
        dataset,
        rows,
        size=preprocessing.size,
        channels=preprocessing.channels,
        mean=preprocessing.mean,
        std=preprocessing.std,
        batch=_BATCH,
        device=device,
    )


def _whole(
    dataset: Dataset, rows: NDArray[np.int64], preprocessing: Preprocessing, device: torch.device
) -> Iterator[Pixels]:
    for batch in _batches(dataset, rows, preprocessing, device):
        yield from (_pixels(image, preprocessing) for image in batch)


def _pixels(image_CSS: Tensor, preprocessing: Preprocessing) -> Pixels:
    """(S, S) or (S, S, 3), 8 bits, of a normalised image."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    shown = (image_CSS.cpu() * std + mean).clamp(0, 1).mul(255).round().byte().numpy()
    return shown[0] if len(shown) == 1 else np.ascontiguousarray(shown.transpose(1, 2, 0))


def _over(image: Pixels, map_SS: NDArray[np.float32]) -> Pixels:
    gray = image if image.ndim == 2 else image.mean(axis=2)
    most = map_SS.max()
    colour = np.asarray(matplotlib.colormaps[_COLOURS](map_SS / most if most > 0 else map_SS))[..., :3]
    mixed = 0.65 * colour + 0.35 * gray[..., None] / 255
    return np.rint(255 * mixed).astype(np.uint8)
