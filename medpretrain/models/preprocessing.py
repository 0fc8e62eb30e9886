"""What is done to an image before a backbone sees it; it travels with the backbone into evaluation and export."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_prep.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """Resize to a square ("squash": the aspect ratio is not kept), scale to [0, 1], subtract mean, divide by std.

    Raises:
        UserError: a size, channel count or bit depth out of range, a mean or std that does not fit.

    >>> Preprocessing(size=64, channels=1, mean=(0.5,), std=(0.25,)).bit_depth
    8
    """

    size: int
    """Height and width in pixels."""
    channels: int
    mean: tuple[float, ...]
    """One value a channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    bit_depth: int = 8
    """Pixels are divided by 2 ** bit_depth - 1."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels < 1:
            raise UserError(f"size and channels must be positive, not {self.size} and {self.channels}")
        if not 1 <= self.bit_depth <= 16:
            raise UserError(f"bit_depth must be from 1 to 16, not {self.bit_depth}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            counts = f"{len(self.mean)} and {len(self.std)}"
            raise UserError(f"mean and std need one value for each of {self.channels} channels, not {counts}")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"mean must be finite and std positive, not {self.mean} and {self.std}")
