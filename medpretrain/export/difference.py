"""How far the features of an export lie from those of the backbone it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_prep.errors import WorkFailed

BATCHES = (1, 2, 7)
TOLERANCE = 1e-5


class FeaturesDiffer(WorkFailed):
    """A form of the export, loaded back, does not compute what the trained backbone computes; nothing was written."""


@dataclass(frozen=True)
class Difference:
    """Of the features of random images in batches of 1, 2 and 7, in float32 on the CPU."""

    absolute: float
    """The largest of all."""
    largest: float
    """The largest magnitude of a feature."""
    allowed: float

    @property
    def relative(self) -> float:
        """To the largest feature."""
        return self.absolute / self.largest if self.largest else 0.0


def measure(
    form: str,
    trained: Callable[[Tensor], Tensor],
    loaded: Callable[[Tensor], Tensor],
    images: Callable[[int], Tensor],
    *,
    exact: bool,
) -> Difference:
    """Compare two functions of images.

    Args:
        form: for messages.
        trained: what is right.
        loaded: what was written and read again.
        images: makes a batch of a size.
        exact: no difference is allowed; else 1e-5, of the largest feature where one is above 1: float32 keeps seven
            digits of a number, not seven places behind its point.

    Raises:
        FeaturesDiffer: by more than is allowed; features that are not finite.
    """
    absolute, largest = 0.0, 0.0
    with torch.inference_mode():
        for n in BATCHES:
            batch = images(n)
            expected, got = trained(batch), loaded(batch)
            if got.shape != expected.shape or not torch.isfinite(expected).all() or not torch.isfinite(got).all():
                raise FeaturesDiffer(
                    f"{form}: features {tuple(got.shape)} and {tuple(expected.shape)}, or values that are not finite"
                )
            absolute = max(absolute, (got - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    allowed = 0.0 if exact else TOLERANCE * max(1.0, largest)
    if not absolute <= allowed:
        raise FeaturesDiffer(f"{form}: the features of the export differ by {absolute:.3g}; {allowed:.3g} is allowed")
    return Difference(absolute, largest, allowed)


def random_images(channels: int, size: int, *, pixels: bool) -> Callable[[int], Tensor]:
    """Batches of random images, always the same: normal, as after normalisation, or pixels from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if pixels else torch.randn
    return lambda n: draw(n, channels, size, size, generator=generator)


def enlarged(loaded: nn.Module) -> Callable[[Tensor], Tensor]:
    """The timm form of a 3x3 stem as a function of images at their own size."""
    return lambda images: loaded(nn.functional.interpolate(images, scale_factor=2))
