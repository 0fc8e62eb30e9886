"""A retinal photograph: find the field of view, cut to it, blacken all around it, and measure whether it can be used.

The camera's aperture makes the field a disc, often cut by the frame, and an ellipse where somebody resized the file to
another shape. All around it is black or a flat colour, with JPEG noise, a camera's notch, a date or a name in it.
Pixels are cut at full resolution and never resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from data_prep.field_of_view import DARK, Ellipse, Field, covered_share, ellipse_mask, find_field
from data_prep.quarantine import Rejected

QUALITY_DIAMETER = 192  # the disc's diameter in pixels where quality is measured
FINE = (0.004, 0.008)  # Gaussians' standard deviations in disc diameters: the width of thin vessels
COARSE = (0.0105, 0.021)  # of thick vessels
BRIGHT = 240.0  # of 255: the green channel's mean over a region that is overexposed


@dataclass(frozen=True)
class RetinaSettings:
    """What a usable photograph must reach. The defaults refuse what shows no retina, and keep poor pictures of one.

    Attributes:
        min_sharpness: see `quality_of`.
        min_colour: the mean distance between the largest and the smallest of R, G and B in the disc, 0 to 255;
            radiographs and angiograms have next to none.
        max_dark: the largest share of the disc that may be too dark to show anything.
        max_bright: the largest share of the disc that may be overexposed.
        min_field: the smallest share of the whole disc that the frame must hold.
    """

    min_sharpness: float = 0.20
    min_colour: float = 2.0
    max_dark: float = 0.40
    max_bright: float = 0.40
    min_field: float = 0.60


class Photograph(NamedTuple):
    """A photograph cut to its field of view.

    Attributes:
        image: square RGB; black outside the disc.
        quality: the measures of `quality_of`, and `field`: the share of the whole disc that is in the picture.
        box: left, top, right and bottom of the cut in pixels of the source, before black was added to make it square.
    """

    image: Image.Image
    quality: dict[str, float]
    box: tuple[int, int, int, int]


def prepare_photograph(image: Image.Image, settings: RetinaSettings) -> Photograph:
    """Cut a photograph to its field of view and measure it.

    Text in the border is gone after this; text that somebody wrote over the retina stays.

    Args:
        image: mode L, RGB or I;16, upright.
        settings: what a usable photograph must reach.

    Raises:
        Rejected: `no_colour`, `no_field_of_view`, `field_cut`, `too_dark`, `too_bright`, `uneven_illumination` or
            `blurred`.
    """
    if image.mode != "RGB":
        raise Rejected("no_colour")
    field = find_field(image)
    covered = 1.0 if field.disc is None else covered_share(field.disc, field.frame)
    if covered < settings.min_field:
        raise Rejected("field_cut")
    values, inside = _normalised(image, field)
    quality = quality_of(values, inside)
    _refuse(quality, settings)
    box = _box(field)
    return Photograph(_cut(image, field, box), {**quality, "field": round(covered, 4)}, box)


def _refuse(quality: dict[str, float], settings: RetinaSettings) -> None:
    """Raise for the first thing that is wrong: light before sharpness, since a black picture is not sharp either."""
    dark, bright = quality["dark"], quality["bright"]
    if dark > settings.max_dark and dark > 0.8:
        raise Rejected("too_dark")
    if bright > settings.max_bright:
        raise Rejected("too_bright")
    if dark > settings.max_dark or dark + bright > max(settings.max_dark, settings.max_bright):
        raise Rejected("uneven_illumination")
    if quality["colour"] < settings.min_colour:
        raise Rejected("no_colour")
    if quality["sharpness"] < settings.min_sharpness:
        raise Rejected("blurred")


# The cut


def _box(field: Field) -> tuple[int, int, int, int]:
    """The disc's bounding box in the frame."""
    left, top, right, bottom = field.frame
    if field.disc is None:
        return field.frame
    x, y, a, b = field.disc
    return (
        max(left, int(np.floor(x - a))),
        max(top, int(np.floor(y - b))),
        min(right, int(np.ceil(x + a))),
        min(bottom, int(np.ceil(y + b))),
    )


def _cut(image: Image.Image, field: Field, box: tuple[int, int, int, int]) -> Image.Image:
    """The box on a black square, everything outside the disc black."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    side = max(width, height)
    square = np.zeros((side, side, 3), np.uint8)
    # Where the frame cuts the disc, its centre stays the square's as far as the square has room.
    x, y = (side - width) // 2, (side - height) // 2
    if field.disc is not None:
        x = min(max(round(side / 2 - (field.disc.x - left)), 0), side - width)
        y = min(max(round(side / 2 - (field.disc.y - top)), 0), side - height)
    part = square[y : y + height, x : x + width]
    part[...] = np.asarray(image.crop(box))
    if field.disc is not None:
        rows = 1 - ((np.arange(top, bottom) + 0.5 - field.disc.y) / field.disc.b) ** 2
        half = field.disc.a * np.sqrt(np.clip(rows, 0, None))
        first = np.clip(np.ceil(field.disc.x - half - 0.5) - left, 0, width).astype(int)
        last = np.clip(np.floor(field.disc.x + half - 0.5) - left + 1, 0, width).astype(int)
        for row, start, end in zip(part, first.tolist(), last.tolist(), strict=True):
            row[:start] = 0
            row[max(start, end) :] = 0
    return Image.fromarray(square)


# Quality


def _normalised(image: Image.Image, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """The disc at `QUALITY_DIAMETER` pixels, round: (D, D, 3) float32 of 0 to 255, and (D, D) bool where it is seen."""
    left, top, right, bottom = field.frame
    if field.disc is None:
        x, y = (left + right) / 2, (top + bottom) / 2
        a = b = max(right - left, bottom - top) / 2
    else:
        x, y, a, b = field.disc
    seen = (max(left, x - a), max(top, y - b), min(right, x + a), min(bottom, y + b))
    scale_x, scale_y = QUALITY_DIAMETER / (2 * a), QUALITY_DIAMETER / (2 * b)
    start = (round((seen[0] - x + a) * scale_x), round((seen[1] - y + b) * scale_y))
    end = (round((seen[2] - x + a) * scale_x), round((seen[3] - y + b) * scale_y))
    size = (max(1, end[0] - start[0]), max(1, end[1] - start[1]))
    part = image.resize(size, Image.Resampling.BILINEAR, box=seen, reducing_gap=2.0)
    values = np.zeros((QUALITY_DIAMETER, QUALITY_DIAMETER, 3), np.float32)
    inside = np.zeros((QUALITY_DIAMETER, QUALITY_DIAMETER), bool)
    rows, columns = slice(start[1], start[1] + size[1]), slice(start[0], start[0] + size[0])
    values[rows, columns] = np.asarray(part)
    inside[rows, columns] = True
    if field.disc is not None:
        centre = QUALITY_DIAMETER / 2 - 0.5
        inside &= ellipse_mask(Ellipse(centre, centre, centre + 0.5, centre + 0.5), inside.shape)
    return values, inside


def quality_of(values: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """Measures of a disc, which do not depend on the camera's resolution since the disc has a fixed size.

    - `sharpness`: how strong the finest detail is against coarser detail: the 90th percentile of the green channel's
      local contrast in the band `FINE` over that in the band `COARSE`. Contrast is relative to the mean nearby, so
      neither exposure nor a cataract's haze alone moves it much; defocus does. Focused photographs have 0.3 to 0.8,
      a Gaussian defocus of 1.5 % of the diameter leaves less than 0.2.
    - `illumination`: the darker tenth's brightness over the brighter tenth's, averaged over 15 % of the diameter; 1 is
      even.
    - `dark`, `bright`: the shares of the disc that are too dark and overexposed, averaged likewise.
    - `brightness`: the median of the largest of R, G and B, 0 to 1.
    - `colour`: the mean of the largest less the smallest of R, G and B, 0 to 255.

    Args:
        values: (D, D, 3) float32, 0 to 255.
        inside: (D, D) bool, where the disc is seen.
    """
    diameter = len(values)
    weight = inside.astype(np.float32)
    light, green = values.max(axis=2), values[..., 1]
    wide = round(0.15 * diameter)
    smooth, mean_green = _mean(light, weight, wide)[inside], _mean(green, weight, wide)
    low, high = np.percentile(smooth, (10, 90))
    # The border takes the neighbourhood's mean, so that the rim is no edge.
    filled, ground = np.where(inside, green, mean_green), mean_green + 8  # of 255: in the dark, noise is no detail
    deep = ndimage.binary_erosion(inside, iterations=max(1, round(0.05 * diameter)))
    detail = [_detail(filled, band, diameter) / ground for band in (FINE, COARSE)]
    fine, coarse = (float(np.percentile(band[deep], 90)) if deep.any() else 0.0 for band in detail)
    return {
        "sharpness": round(fine / (coarse + 0.002), 4),  # a contrast of 0.002 or less is noise
        "illumination": round(float(low / max(high, 1)), 4),
        "dark": round(float((smooth < DARK).mean()), 4),
        "bright": round(float((mean_green[inside] > BRIGHT).mean()), 4),
        "brightness": round(float(np.median(light[inside]) / 255), 4),
        "colour": round(float((light - values.min(axis=2))[inside].mean()), 2),
    }


def _detail(green: np.ndarray, band: tuple[float, float], diameter: int) -> np.ndarray:
    """The size of what is between two Gaussians wide."""
    narrow, wide = (ndimage.gaussian_filter(green, sigma * diameter, truncate=3) for sigma in band)
    return np.maximum(np.abs(narrow - wide) - 0.12, 0)  # the 90th percentile of what rounding to 8 bits leaves


def _mean(values: np.ndarray, weight: np.ndarray, side: int) -> np.ndarray:
    """The mean over a square of `side` pixels, of the disc's pixels alone."""
    total = ndimage.uniform_filter(values * weight, side, mode="constant")
    return np.asarray(total / np.maximum(ndimage.uniform_filter(weight, side, mode="constant"), 1e-3))
