"""Augmented views of given images, as a run sees them in training, for what is measured between views."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.dataset import Dataset
from data_prep.errors import UserError, WorkFailed
from medpretrain.data.augment import apply
from medpretrain.data.pipeline import CropPipeline, Crops, DecodeError, Feed
from medpretrain.data.views import Jitter, Parameters, View, draw
from medpretrain.methods import method_class
from medpretrain.models.preprocessing import Preprocessing
from medpretrain.recipe import Recipe

# Draws of views that are measured are named apart from those of training.
_NAME = "measured"


def default_view(size: int) -> View:
    """For a source that was trained without views: a crop of 20 to 100 % of the area, flipped half the time, with
    brightness and contrast changed by up to 40 % in 80 % of the views. SimCLR's first choices, for gray images too."""
    return View(size=size, crop=(0.2, 1.0), flip=0.5, jitter=Jitter(p=0.8, brightness=0.4, contrast=0.4))


def view_of(recipe: Recipe) -> View:
    """The first kind of view of a recipe, which has the size at which its backbone sees whole images."""
    return recipe.views[next(iter(method_class(recipe.method["name"]).view_kinds))].model_copy(update={"count": 1})


def augmented(
    dataset: Dataset,
    rows: NDArray[np.int64],
    view: View,
    preprocessing: Preprocessing,
    *,
    views: int,
    seed: int,
    device: torch.device,
    batch: int = 64,
    threads: int = 2,
) -> Iterator[Tensor]:
    """V views of each image, (n, V, C, S, S) normalised, n <= batch, in the order of the rows.

    A view is a function of (seed, row, number of the view): of no batch size, and of no other image.

    Args:
        view: how; of the preprocessing's size.
        views: V.

    Raises:
        UserError: no row, no view, or a view of another size than the preprocessing's.
        WorkFailed: an image does not decode. None is replaced: what is measured is of all the images.
    """
    if not len(rows) or views < 1:
        raise UserError(f"there are no views to make: {len(rows)} images, {views} views of each")
    if view.size != preprocessing.size:
        raise UserError(f"the view has {view.size} pixels a side, and the network sees {preprocessing.size}")
    mean, std = (torch.tensor(values, device=device) for values in (preprocessing.mean, preprocessing.std))
    planned: list[list[Parameters]] = []

    def feeds() -> Iterator[Feed]:
        for first in range(0, len(rows), batch):
            some = rows[first : first + batch]
            padded = np.concatenate([some, np.repeat(some[-1:], batch - len(some))])  # DALI wants equal batches
            planned.append([_draw(dataset, padded, view, preprocessing, seed, number) for number in range(views)])
            crops = [Crops(drawn.start, drawn.end, drawn.flip) for drawn in planned[-1]]
            yield dataset.read(padded), dataset.sizes[padded], crops

    pipeline = CropPipeline(
        feeds(),
        sizes=[view.size] * views,
        batch=batch,
        channels=preprocessing.channels,
        bit_depth=dataset.bit_depth,
        device=device,
        threads=threads,
        ahead=2,
    )
    left = len(rows)
    try:
        for crops in pipeline:
            drawn = planned.pop(0)
            made = [apply(crop, view, parameters, mean, std) for crop, parameters in zip(crops, drawn, strict=True)]
            yield torch.stack(made, dim=1)[:left]
            left -= batch
    except (DecodeError, OSError) as error:
        raise WorkFailed(
            f"an image of {dataset.path} does not decode ({error}), and none is left out or replaced where something "
            f"is measured; 'medpretrain prep verify {dataset.path}' finds all that are damaged"
        ) from None


def view_features(backbone: nn.Module, images: Iterator[Tensor], device: torch.device) -> NDArray[np.float32]:
    """Features (N, V, D) of what `augmented` yields; the backbone is moved to the device, into eval mode."""
    backbone.to(device).eval()
    with torch.inference_mode():
        parts = [backbone(some.flatten(0, 1)).float().reshape(*some.shape[:2], -1).cpu().numpy() for some in images]
    return np.concatenate(parts)


def _draw(
    dataset: Dataset, rows: NDArray[np.int64], view: View, preprocessing: Preprocessing, seed: int, number: int
) -> Parameters:
    return draw(
        view,
        seed=seed,
        epoch=np.zeros_like(rows),
        sample=rows,
        name=_NAME,
        number=number,
        size=dataset.sizes[rows],
        channels=preprocessing.channels,
        center=float(np.mean(preprocessing.mean)),
    )
