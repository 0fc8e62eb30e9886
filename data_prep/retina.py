"""A retinal photograph: find the field of view, cut to it, blacken all around it, and measure whether it can be used.

The camera's aperture makes the field a disc, often cut by the frame, and an ellipse where somebody resized the file to
another shape. All around it is black or a flat colour, with JPEG noise, a camera's notch, a date or a name in it. The
disc is found as an axis-aligned ellipse on a copy of `FIND_SIDE` pixels; pixels are cut at full resolution and never
resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from data_prep.quarantine import Rejected

FIND_SIDE = 256  # the longer side of the copy on which the disc is looked for
QUALITY_DIAMETER = 192  # the disc's diameter where quality is measured

_RAYS = 360
_TRIALS = 300
_TOLERANCE = 1.5  # pixels of the small copy between a boundary point and the ellipse it belongs to
_STEPS = (5.0, 9.0, 16.0, 28.0, 50.0)  # how much brighter than the border the field may start, of 255
_FLAT = 14.0  # colours as near as this to a flat frame's belong to it
_MARGIN = 0.5  # pixels of the small copy that are given to the border


@dataclass(frozen=True)
class RetinaSettings:
    """What a usable photograph must reach. The defaults refuse what shows no retina, and keep poor pictures of one.

    Attributes:
        min_sharpness: see `quality_of`.
        min_colour: the mean distance between the largest and the smallest of R, G and B in the disc, 0 to 255; radiographs
            and angiograms have next to none.
        max_dark: the largest share of the disc that may be too dark to show anything.
        max_bright: the largest share of the disc that may be overexposed.
        min_field: the smallest share of the whole disc that the frame must hold.
    """

    min_sharpness: float = 0.010
    min_colour: float = 4.0
    max_dark: float = 0.40
    max_bright: float = 0.40
    min_field: float = 0.60


class Ellipse(NamedTuple):
    """An axis-aligned ellipse: centre and half axes in pixels, x to the right and y down, from the image's corner."""

    x: float
    y: float
    a: float
    b: float


class Field(NamedTuple):
    """Where the retina is: in `frame` (left, top, right, bottom), and in `disc`, None where it fills the frame."""

    frame: tuple[int, int, int, int]
    disc: Ellipse | None


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
    covered = 1.0 if field.disc is None else _covered(field.disc, field.frame)
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


# Where the disc is


def find_field(image: Image.Image) -> Field:
    """Find the disc of an RGB photograph.

    Several brightness steps between border and field are tried; of the ellipses that fit, the one with the strongest
    edge wins. Nothing here is random: trials are drawn with a fixed seed.

    Raises:
        Rejected: `too_dark` where nothing stands out of the black, `no_field_of_view` where what does is no disc.
    """
    small, scale_x, scale_y = _reduced(image)
    values = np.asarray(small).astype(np.float32)
    left, top, right, bottom = _without_flat_frame(values)
    values = values[top:bottom, left:right]
    light = ndimage.uniform_filter(values.max(axis=2), 3)
    if min(light.shape) < 16:
        raise Rejected("no_field_of_view")
    dark = _border_level(light)
    best: tuple[float, Ellipse] | None = None
    whole = False
    for step in _STEPS:
        component = _largest(light > dark + step)
        if component is None:
            break
        points, cut = _boundary(component)
        # A field without any border reaches the frame whichever way one looks.
        whole = whole or (step == _STEPS[0] and cut > 0.97)
        ellipse = _fitted(points) if len(points) >= 12 else None
        if ellipse is None or not _plausible(ellipse, component):
            continue
        strength = _edge_strength(light, ellipse)
        if best is None or strength > best[0] + 0.02:
            best = (strength, ellipse)
    frame = (
        round(left * scale_x),
        round(top * scale_y),
        min(image.width, round(right * scale_x)),
        min(image.height, round(bottom * scale_y)),
    )
    if whole:
        return Field(frame, None)
    if best is None or best[0] < 0.25:
        raise Rejected("too_dark" if float(np.percentile(light, 99)) < dark + 2 * _STEPS[0] else "no_field_of_view")
    x, y, a, b = best[1]
    # Pixel (0, 0) of the small copy has its centre at 0.5.
    disc = Ellipse(
        (x + left + 0.5) * scale_x, (y + top + 0.5) * scale_y, (a - _MARGIN) * scale_x, (b - _MARGIN) * scale_y
    )
    return Field(frame, disc)


def _reduced(image: Image.Image) -> tuple[Image.Image, float, float]:
    """A copy with `FIND_SIDE` pixels at the longer side, and how many source pixels stand for one of its."""
    factor = max(image.size) / FIND_SIDE
    size = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
    # Whole-numbered averaging first: several times as fast, and what is left for the exact step is small.
    small = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0) if factor > 1 else image.resize(size)
    return small, image.width / size[0], image.height / size[1]


def _without_flat_frame(values: np.ndarray) -> tuple[int, int, int, int]:
    """The part inside bars of one bright colour along the edges, such as a page's white: left, top, right, bottom."""
    height, width = values.shape[:2]
    left, top, right, bottom = 0, 0, width, height
    corners = values[[0, 0, -1, -1], [0, -1, 0, -1]]
    colour = np.median(corners, axis=0)
    if colour.max() < 60 or np.abs(corners - colour).max() > _FLAT:
        return left, top, right, bottom
    flat = np.abs(values - colour).max(axis=2) <= _FLAT
    rows, columns = flat.mean(axis=1) > 0.97, flat.mean(axis=0) > 0.97
    if rows.all() or columns.all():
        raise Rejected("no_field_of_view")
    while rows[top]:
        top += 1
    while rows[bottom - 1]:
        bottom -= 1
    while columns[left]:
        left += 1
    while columns[right - 1]:
        right -= 1
    if (left, top, right, bottom) != (0, 0, width, height):  # the bar's blurred edge goes with it
        left, top = left + (left > 0), top + (top > 0)
        right, bottom = right - (right < width), bottom - (bottom < height)
    return left, top, right, bottom


def _border_level(light: np.ndarray) -> float:
    """How bright the border is: the darker half of the corners, where no disc reaches."""
    side = max(3, min(light.shape) // 24)
    corners = [light[:side, :side], light[:side, -side:], light[-side:, :side], light[-side:, -side:]]
    return float(np.mean(sorted(float(np.median(corner)) for corner in corners)[:2]))


def _largest(mask: np.ndarray) -> np.ndarray | None:
    """The largest connected part without its thin ones (letters, a notch), holes filled; None where all is small."""
    opened = ndimage.binary_opening(np.pad(mask, 4, mode="edge"), iterations=3)[4:-4, 4:-4]
    parts, count = ndimage.label(opened)
    if not count:
        return None
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    if sizes.max() < 0.03 * mask.size:
        return None
    return np.asarray(ndimage.binary_fill_holes(parts == sizes.argmax()))


def _boundary(component: np.ndarray) -> tuple[np.ndarray, float]:
    """The last pixel of the component along each ray from its centre: (n, 2) x and y, and the share cut by the frame."""
    height, width = component.shape
    y, x = (float(np.mean(index)) for index in np.nonzero(component))
    angles = np.arange(_RAYS) * (2 * np.pi / _RAYS)
    radii = np.arange(0, np.hypot(height, width), 0.5)
    columns = np.rint(x + np.outer(np.cos(angles), radii)).astype(np.intp)
    rows = np.rint(y + np.outer(np.sin(angles), radii)).astype(np.intp)
    there = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    hit = there & component[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    last = hit.shape[1] - 1 - hit[:, ::-1].argmax(axis=1)
    reach = radii[last] + 0.5  # to the pixel's outer edge
    points = np.stack([x + np.cos(angles) * reach, y + np.sin(angles) * reach], axis=1)[hit.any(axis=1)]
    cut = (points.min(axis=1) < 2) | (points[:, 0] > width - 3) | (points[:, 1] > height - 3)
    return points[~cut], float(cut.mean())


def _fitted(points: np.ndarray) -> Ellipse | None:
    """The circle, or else the axis-aligned ellipse, that most of the boundary lies on (RANSAC, then least squares)."""
    circle, inliers = _consensus(points, 3)
    if inliers < 0.9 * len(points):
        ellipse, more = _consensus(points, 4)
        if more > 1.15 * inliers:
            circle, inliers = ellipse, more
    return circle if inliers >= max(12, 0.3 * len(points)) else None


def _consensus(points: np.ndarray, unknowns: int) -> tuple[Ellipse | None, int]:
    """The best of `_TRIALS` curves through 3 (circle) or 4 (ellipse) points, refined on its inliers; their number."""
    rng = np.random.default_rng(0)
    sample = rng.integers(0, len(points), (_TRIALS, unknowns))
    centre = points.mean(axis=0)
    scale = float(np.abs(points - centre).max())
    x, y = ((points - centre) / scale).T
    if unknowns == 3:  # x^2 + y^2 = p x + q y + r
        terms, square = np.stack([x, y, np.ones_like(x)], axis=1), x**2 + y**2
    else:  # x^2 = s y^2 + p x + q y + r
        terms, square = np.stack([x, y, np.ones_like(x), y**2], axis=1), x**2
    matrices = terms[sample]
    solvable = np.abs(np.linalg.det(matrices)) > 1e-6
    if not solvable.any():
        return None, 0
    solutions = np.linalg.solve(matrices[solvable], square[sample[solvable]][..., None])[..., 0]
    curves = _curves(solutions)
    distances = _distances(curves, x, y) * scale
    counts = (distances < _TOLERANCE).sum(axis=1)
    near = distances[counts.argmax()] < _TOLERANCE
    if not counts.max():
        return None, 0
    for _ in range(2):
        solution = np.linalg.lstsq(terms[near], square[near], rcond=None)[0]
        curve = _curves(solution[None])
        near = _distances(curve, x, y)[0] * scale < _TOLERANCE
        if near.sum() < unknowns:
            return None, 0
    x0, y0, a, b = curve[0] * scale
    return Ellipse(x0 + centre[0], y0 + centre[1], a, b), int(near.sum())


def _curves(solutions: np.ndarray) -> np.ndarray:
    """(n, 4) centre and half axes of the curves that the coefficients describe, NaN where there is no such ellipse."""
    p, q, r = solutions.T[:3]
    s = -solutions[:, 3] if solutions.shape[1] == 4 else np.ones_like(p)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = p / 2, q / (2 * s)
        square = r + x**2 + s * y**2
        a, b = np.sqrt(square), np.sqrt(square / s)
        bad = ~((s > 0.25) & (s < 4) & (a > 0.2) & (a < 5))
    curves = np.stack([x, y, a, b], axis=1)
    curves[bad] = np.nan
    return curves


def _distances(curves: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(curves, points): about how far each point is from each ellipse; infinite where the curve is none."""
    with np.errstate(invalid="ignore"):
        rho = np.hypot((x - curves[:, :1]) / curves[:, 2:3], (y - curves[:, 1:2]) / curves[:, 3:4])
        distances = np.abs(rho - 1) * np.sqrt(curves[:, 2:3] * curves[:, 3:4])
    return np.where(np.isnan(distances), np.inf, distances)


def _plausible(ellipse: Ellipse, component: np.ndarray) -> bool:
    """The ellipse holds the component, and the component a good part of what the frame shows of the ellipse."""
    inside = _mask(ellipse, component.shape)
    both = int((inside & component).sum())
    return both >= 0.94 * int(component.sum()) and both >= 0.35 * int(inside.sum()) and inside.mean() > 0.1


def _mask(ellipse: Ellipse, shape: tuple[int, ...]) -> np.ndarray:
    """(height, width) bool: pixels whose centre is in the ellipse, with pixel centres at whole numbers."""
    x = ((np.arange(shape[1]) - ellipse.x) / ellipse.a) ** 2
    y = ((np.arange(shape[0]) - ellipse.y) / ellipse.b) ** 2
    return np.asarray(y[:, None] + x[None, :] <= 1)


def _edge_strength(light: np.ndarray, ellipse: Ellipse) -> float:
    """How much brighter it is just inside than just outside, 0 to 1, over what the frame shows of the ellipse."""
    angles = np.arange(_RAYS) * (2 * np.pi / _RAYS)
    samples = []
    visible = np.ones(_RAYS, bool)
    for offset in (-4.0, 4.0):
        column = np.rint(ellipse.x + np.cos(angles) * (ellipse.a + offset)).astype(np.intp)
        row = np.rint(ellipse.y + np.sin(angles) * (ellipse.b + offset)).astype(np.intp)
        visible &= (column >= 0) & (column < light.shape[1]) & (row >= 0) & (row < light.shape[0])
        samples.append(light[row.clip(0, light.shape[0] - 1), column.clip(0, light.shape[1] - 1)])
    if visible.sum() < 8:
        return 0.0
    return float(np.clip((samples[0] - samples[1])[visible] / 12, 0, 1).mean())


def _covered(disc: Ellipse, frame: tuple[int, int, int, int]) -> float:
    """The share of the disc's area that lies in the frame."""
    x = np.linspace(-1, 1, 257)
    inside = x[:, None] ** 2 + x[None, :] ** 2 <= 1
    columns, rows = disc.x + disc.a * x, disc.y + disc.b * x
    seen = ((rows >= frame[1]) & (rows <= frame[3]))[:, None] & ((columns >= frame[0]) & (columns <= frame[2]))[None, :]
    return float((inside & seen).sum() / inside.sum())


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
        inside &= _mask(Ellipse(centre, centre, centre + 0.5, centre + 0.5), inside.shape)
    return values, inside


def quality_of(values: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """Measures of a disc, which do not depend on the camera's resolution since the disc has a fixed size.

    - `sharpness`: the 90th percentile of local contrast at the width of vessels: the green channel's difference between
      Gaussians of 0.5 % and 1 % of the disc's diameter, relative to its mean over 8 %. About 0.03 to 0.08 in good
      photographs, less than 0.01 out of focus.
    - `illumination`: the darker tenth's brightness over the brighter tenth's, smoothed over 6 % of the diameter; 1 is even.
    - `dark`, `bright`: the shares of the disc that are too dark and overexposed, smoothed likewise.
    - `brightness`: the median of the largest of R, G and B, 0 to 1.
    - `colour`: the mean of the largest less the smallest of R, G and B, 0 to 255.

    Args:
        values: (D, D, 3) float32, 0 to 255.
        inside: (D, D) bool, where the disc is seen.
    """
    diameter = len(values)
    weight = inside.astype(np.float32)
    light = values.max(axis=2)
    smooth = _smoothed(light, weight, 0.06 * diameter)[inside]
    green_smooth = _smoothed(values[..., 1], weight, 0.06 * diameter)[inside]
    low, high = np.percentile(smooth, (10, 90))
    green = values[..., 1]
    fine = _smoothed(green, weight, 0.005 * diameter) - _smoothed(green, weight, 0.01 * diameter)
    contrast = np.abs(fine) / (_smoothed(green, weight, 0.08 * diameter) + 8)  # 8 of 255: a black disc's noise is none
    deep = ndimage.binary_erosion(inside, iterations=max(1, round(0.03 * diameter)))  # the rim is an edge of its own
    return {
        "sharpness": round(float(np.percentile(contrast[deep], 90)), 5) if deep.any() else 0.0,
        "illumination": round(float(low / max(high, 1)), 4),
        "dark": round(float((smooth < DARK).mean()), 4),
        "bright": round(float((green_smooth > BRIGHT).mean()), 4),
        "brightness": round(float(np.median(light[inside]) / 255), 4),
        "colour": round(float((light - values.min(axis=2))[inside].mean()), 2),
    }


DARK = 14.0
BRIGHT = 240.0


def _smoothed(values: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian mean over the disc alone."""
    total = ndimage.gaussian_filter(values * weight, sigma, truncate=3, mode="constant")
    return np.asarray(total / np.maximum(ndimage.gaussian_filter(weight, sigma, truncate=3, mode="constant"), 1e-3))
