"""What a view of an image is, and the parameters of each augmentation as a pure function of (seed, epoch, sample)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from medpretrain.data.counter import Words, hash64, normal, purpose, uniform

Probability = Annotated[float, Ge(0), Le(1)]
Amount = Annotated[float, Ge(0)]
Array = NDArray[np.float64]

BIAS_GRID = 4  # control points a side: the slowest variation that is not yet a plain gradient
_CROP_TRIES = 10


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Jitter(_Spec):
    """Colour jitter. Factors are uniform in [1 - x, 1 + x]; hue is uniform in [-x, x] turns."""

    p: Probability = 0.8
    brightness: Amount = 0.0
    contrast: Amount = 0.0
    saturation: Amount = 0.0
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.0


class Blur(_Spec):
    """Gaussian blur; sigma uniform in a range, in pixels of the view; the kernel reaches `kernel` // 2 pixels."""

    p: Probability = 0.5
    sigma: tuple[Amount, Amount] = (0.1, 2.0)
    kernel: Annotated[int, Ge(3)] = 23

    @model_validator(mode="after")
    def _odd_kernel(self) -> Blur:
        if self.kernel % 2 == 0:
            raise ValueError("the kernel must be odd")
        return self


class Noise(_Spec):
    """Gaussian noise; the standard deviation is uniform in [0, std], in units of full intensity."""

    p: Probability = 0.5
    std: Amount = 0.1


class BiasField(_Spec):
    """A smooth multiplicative field: exp of a 4 x 4 grid of normal draws times `scale`, bicubically enlarged."""

    p: Probability = 0.5
    scale: Amount = 0.1


class Augmentation(_Spec):
    """What is done to an image on its way to a view.

    `crop` is the range of the cropped area as a fraction of the image's (None: the whole image). `quarter_turns` is the
    probability of a turn by 90, 180 or 270 degrees, each as likely.
    """

    crop: tuple[Annotated[float, Gt(0), Le(1)], Annotated[float, Gt(0), Le(1)]] | None = None
    ratio: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = (3 / 4, 4 / 3)
    flip: Probability = 0.0
    quarter_turns: Probability = 0.0
    jitter: Jitter | None = None
    grayscale: Probability = 0.0
    blur: Blur | None = None
    noise: Noise | None = None
    bias_field: BiasField | None = None

    @model_validator(mode="after")
    def _ranges(self) -> Augmentation:
        for name, pair in (("crop", self.crop), ("ratio", self.ratio), ("sigma", self.blur and self.blur.sigma)):
            if pair and pair[0] > pair[1]:
                raise ValueError(f"{name} must be [low, high] with low <= high, not {list(pair)}")
        return self


class View(Augmentation):
    """One kind of view: how many of it an image gets, at which size, and how each is augmented.

    The crop, or the whole image, is resized to `size` x `size` pixels without keeping the aspect ratio.
    """

    size: Annotated[int, Ge(8)]
    count: Annotated[int, Ge(1)] = 1
    second: Augmentation | None = None
    """How the second view of this kind is augmented, where it is not like the others: all of it, for nothing is taken
    over from them."""

    @model_validator(mode="after")
    def _a_second(self) -> View:
        if self.second is not None and self.count < 2:
            raise ValueError("second is of the second view, and count is 1")
        return self

    def of(self, number: int) -> Augmentation:
        """How view `number` of this kind is augmented, counted from 0."""
        return self.second if number == 1 and self.second is not None else self


@dataclass(frozen=True)
class Parameters:
    """What is done to each of n images for one view.

    Shapes: `start` and `end` (n, 2), the crop's (y, x) corners in 0..1 of the image; `flip` (n,) bool; `turns` (n,), by
    90 degrees counterclockwise, after the flip; `colour`
    (n, C, C + 1), the affine map of intensities in 0..1; `sigma` (n,) in pixels, 0 for none; `noise` (n,) standard
    deviation and `noise_key` (n,); `bias` (n, 4, 4), the logarithm of the field's control points.
    """

    start: NDArray[np.float32]
    end: NDArray[np.float32]
    flip: NDArray[np.bool_]
    turns: NDArray[np.int64]
    colour: NDArray[np.float32]
    sigma: NDArray[np.float32]
    noise: NDArray[np.float32]
    noise_key: NDArray[np.int64]
    bias: NDArray[np.float32]

    def digest(self) -> NDArray[np.uint64]:
        """One 64-bit number an image that changes when any of its parameters does."""
        parts = [getattr(self, name).reshape(len(self.flip), -1) for name in self.__dataclass_fields__]
        words = np.concatenate([np.ascontiguousarray(part).astype(np.float64).view(np.int64) for part in parts], axis=1)
        return hash64(*words.T)


class _Draws:
    """The draws of one view of a batch: each is named by what it decides."""

    def __init__(self, *words: Words) -> None:
        self._words = words

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, *, turn: int = 0) -> Array:
        return uniform(*self._words, purpose(name), turn, low=low, high=high)

    def happens(self, name: str, p: float) -> NDArray[np.bool_]:
        return self.uniform(name) < p

    def normal(self, name: str, turn: int) -> Array:
        return normal(*self._words, purpose(name), turn)

    def key(self, name: str) -> NDArray[np.int64]:
        return (hash64(*self._words, purpose(name)) >> np.uint64(1)).astype(np.int64)


def draw(
    view: Augmentation,
    *,
    seed: int,
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
    name: str,
    number: int,
    size: NDArray[np.int32],
    channels: int,
    center: float,
) -> Parameters:
    """The augmentation parameters of view `number` of the kind `name`, vectorised over a batch.

    Args:
        epoch, sample: (n,), which with the seed name every draw.
        size: (n, 2), height and width in pixels, for the crop's aspect ratio.
        channels: 1 or 3.
        center: the intensity in 0..1 about which contrast is changed: the mean of the dataset.
    """
    draws = _Draws(seed, purpose(name), number, epoch, sample)
    start, end = _crop(view, draws, size)
    count = len(sample)
    zeros = np.zeros(count)

    def amount(kind: str, p: float, low: float, high: float) -> Array:
        return np.where(draws.happens(f"{kind}?", p), draws.uniform(kind, low, high), 0.0)

    blur, noise, bias = view.blur, view.noise, view.bias_field
    grid = np.zeros((count, BIAS_GRID, BIAS_GRID))
    if bias is not None:
        points = [draws.normal("bias", turn) for turn in range(BIAS_GRID**2)]
        happens = draws.happens("bias?", bias.p)[:, None, None]
        grid = happens * bias.scale * np.stack(points, axis=1).reshape(grid.shape)
    return Parameters(
        start=start.astype(np.float32),
        end=end.astype(np.float32),
        flip=draws.happens("flip", view.flip),
        turns=amount("turns", view.quarter_turns, 1.0, 4.0).astype(np.int64),
        colour=_colour(view, draws, count, channels, center).astype(np.float32),
        sigma=(amount("blur", blur.p, *blur.sigma) if blur else zeros).astype(np.float32),
        noise=(amount("noise", noise.p, 0.0, noise.std) if noise else zeros).astype(np.float32),
        noise_key=draws.key("noise pixels"),
        bias=grid.astype(np.float32),
    )


def _crop(view: Augmentation, draws: _Draws, size: NDArray[np.int32]) -> tuple[Array, Array]:
    """Crop corners, (n, 2) each: the first of ten tries that fits into the image, else the largest centred one."""
    if view.crop is None:
        return np.zeros(size.shape), np.ones(size.shape)
    height, width = size[:, 0].astype(np.float64), size[:, 1].astype(np.float64)
    aspect = width / height
    ratio = np.clip(aspect, *view.ratio)
    high, wide = np.minimum(1.0, aspect / ratio), np.minimum(1.0, ratio / aspect)
    done = np.zeros(len(size), dtype=bool)
    for turn in range(_CROP_TRIES):
        area = draws.uniform("area", *view.crop, turn=turn)
        ratio = np.exp(draws.uniform("ratio", np.log(view.ratio[0]), np.log(view.ratio[1]), turn=turn))
        try_high, try_wide = np.sqrt(area / ratio * aspect), np.sqrt(area * ratio / aspect)  # fractions of the image
        fits = ~done & (try_high <= 1) & (try_wide <= 1)
        high, wide = np.where(fits, try_high, high), np.where(fits, try_wide, wide)
        done |= fits
        if done.all():
            break
    top = np.where(done, draws.uniform("top"), 0.5) * (1 - high)
    left = np.where(done, draws.uniform("left"), 0.5) * (1 - wide)
    return np.stack([top, left], axis=1), np.stack([top + high, left + wide], axis=1)


_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def _colour(view: Augmentation, draws: _Draws, count: int, channels: int, center: float) -> Array:
    """Brightness, contrast, saturation, hue and grayscale, in this order, as one affine map a sample."""
    jitter = view.jitter or Jitter(p=0.0)
    happens = draws.happens("jitter?", jitter.p)

    def factor(kind: str, amount: float) -> Array:
        return np.where(happens, draws.uniform(kind, max(0.0, 1 - amount), 1 + amount), 1.0)

    brightness, contrast = factor("brightness", jitter.brightness), factor("contrast", jitter.contrast)
    matrix = np.tile(np.eye(channels), (count, 1, 1)) * (brightness * contrast)[:, None, None]
    offset = np.repeat((center * (1 - contrast))[:, None], channels, axis=1)
    if channels == 3:
        gray = draws.happens("grayscale", view.grayscale)
        saturation = np.where(gray, 0.0, factor("saturation", jitter.saturation))[:, None, None]
        matrix = (saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))) @ matrix
        if jitter.hue > 0:
            turn = 2 * np.pi * np.where(happens, draws.uniform("hue", -jitter.hue, jitter.hue), 0.0)
            matrix = _hue_rotation(turn) @ matrix
        # The offset is gray: neither saturation nor hue changes it.
    return np.concatenate([matrix, offset[:, :, None]], axis=2)


def _hue_rotation(turn: Array) -> Array:
    """A rotation of the chroma plane of YIQ, (n, 3, 3); luma stays."""
    rotation = np.zeros((len(turn), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(turn)
    rotation[:, 1, 2], rotation[:, 2, 1] = -np.sin(turn), np.sin(turn)
    return _FROM_YIQ @ rotation @ _TO_YIQ
