"""Training images as the model saw them: cut, turned and coloured by the run's own recipe."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_prep.errors import UserError, WorkFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from medpretrain.data.mixture import Mixture
    from medpretrain.report.gather import Run

_SAMPLES = 5
_MOST_VIEWS = 6
_MOST_PIXELS = 96


@dataclass(frozen=True)
class Sample:
    """A training image, and its views in the first batch; PNG."""

    views: list[tuple[str, bytes]]
    labels: list[str]


Reach = Mapping[str, "Mixture | str"]
"""By name of a run its data, or why they are out of reach."""


def dataset_of(run: Run) -> Mixture | str:
    """The data of a run, or why they cannot be shown.

    A path of the recipe is looked for from where the command is given and from the folders above the run's.
    """
    from data_prep.dataset import INFO
    from medpretrain.data.mixture import Mixture

    if not run.datasets:
        return "the run did not write down which data it saw"
    found: list[Path] = []
    for given in run.recipe.data.path:
        places = [Path(given), *(parent / given for parent in list(run.folder.resolve().parents)[:4])]
        there = next((place for place in places if (place / INFO).is_file()), None)
        if there is None:
            return f"the dataset {Path(given).name} is not within reach of this machine"
        found.append(there)
    try:
        mixture = Mixture.open(found, run.recipe.data.weights)
    except UserError:
        return f"{', '.join(path.name for path in found)} cannot be opened as a whole dataset any more"
    if list(mixture.sha256) != run.datasets:
        return f"{', '.join(path.name for path in found)} is not the dataset any more that the run was trained on"
    return mixture


def sample_views(run: Run, mixture: Mixture) -> list[Sample] | str:
    """The first images of the first batch, each view that the method was given of them, or why there are none."""
    try:
        import torch

        from medpretrain.data.augment import apply
        from medpretrain.data.pipeline import CropPipeline, Crops, DecodeError
        from medpretrain.training.loop import build_stream
        from medpretrain.training.process import Process
    except ImportError as error:
        return f"{error.name} is not installed where this report was made"
    recipe = run.recipe
    alone = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"micro_batches": 1}),
            "data": recipe.data.model_copy(update={"trace": False}),
        }
    )
    device = torch.device("cpu")
    try:
        stream = build_stream(alone, mixture, Process(0, 1, 0, 1, device))
        places = stream.order.places(0, _SAMPLES)
        rows = mixture.rows(recipe.data.split)[places.sample]
        plan = stream.parameters(places, rows)
        feed = (
            mixture.read(rows),
            mixture.sizes[rows],
            [Crops(chosen.start, chosen.end, chosen.flip) for _, chosen in plan],
        )
        pipeline = CropPipeline(
            iter([feed]),
            sizes=[view.size for view in recipe.views.values() for _ in range(view.count)],
            batch=len(rows),
            channels=recipe.data.channels,
            bit_depth=mixture.bit_depth,
            device=device,
            threads=1,
            ahead=1,
        )
        crops = next(iter(pipeline))
    except (UserError, WorkFailed, DecodeError, OSError) as error:
        return f"its images could not be read ({type(error).__name__})"
    mean, std = (torch.tensor(values) for values in (recipe.data.mean, recipe.data.std))
    names = [f"{name} {number + 1}" for name, view in recipe.views.items() for number in range(view.count)]
    drawn: list[NDArray[np.uint8]] = []
    for crop, (view, parameters) in zip(crops, plan, strict=True):
        seen = apply(crop, view, parameters, mean, std) * std[:, None, None] + mean[:, None, None]
        drawn.append((seen.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    labels = {name: (mixture.labels(name)[rows], mixture.label_names(name)) for name in recipe.data.labels}
    return [
        Sample(
            [(name, as_png(images[number])) for name, images in list(zip(names, drawn, strict=True))[:_MOST_VIEWS]],
            [words[ids[number]] if ids[number] >= 0 else "unknown" for ids, words in labels.values()],
        )
        for number in range(len(rows))
    ]


def as_png(pixels: NDArray[np.uint8], most: int = _MOST_PIXELS) -> bytes:
    """(S, S, C), C 1 or 3, no larger than `most` pixels a side."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if image.mode != "L":
        image = image.quantize(128, dither=Image.Dither.NONE)
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def thumbnail(path: Path, most: int = _MOST_PIXELS) -> bytes:
    """An image file as a small PNG."""
    with Image.open(path) as image:
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return as_png(pixels[:, :, None] if pixels.ndim == 2 else pixels, most)
