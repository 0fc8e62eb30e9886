"""Where the retina is in a photograph: the disc that the camera's aperture leaves, found as an axis-aligned ellipse.

It is looked for on a copy of `FIND_SIDE` pixels. The border may be any dark colour, or a page's white around a dark
one; the disc may be cut by the frame, and partly in the dark.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from data_prep.quarantine import Rejected

FIND_SIDE = 256  # the longer side of the copy on which the disc is looked for
DARK = 14.0  # of 255: the largest channel's mean over a region that shows nothing

_RAYS = 240
_TRIALS = 120
_TOLERANCE = 1.5  # pixels of the small copy between a boundary point and the ellipse it belongs to
_STEPS = (5.0, 9.0, 16.0, 28.0, 50.0)  # how much brighter than the border the field may start, of 255
_BRIGHT_FRAME = 60.0  # a flat frame darker than this is a border like any other
_FLAT = 8.0  # colours as near as this to a flat frame's belong to it
_MARGIN = 0.5  # pixels of the small copy that are given to the border


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


def find_field(image: Image.Image) -> Field:
    """Find the disc of an RGB photograph.

    Several brightness steps between border and field are tried; of the ellipses that fit, the one with the strongest
    edge wins. Nothing here is random: trials are drawn with a fixed seed.

    Raises:
        Rejected: `too_dark` where nothing stands out of the black, `no_field_of_view` where what does is no disc.
    """
    small, scale_x, scale_y = _reduced(image)
    values = np.asarray(small).astype(np.float32)
    if min(values.shape[:2]) < 16:
        raise Rejected("no_field_of_view")
    light = values.max(axis=2)
    flat = _flat_frame(values)
    if flat is not None:
        if flat.all():
            raise Rejected("no_field_of_view")
        light[flat] = light[~flat].min()
    light = ndimage.uniform_filter(light, 3)
    dark = _border_level(light)
    if flat is None and dark > 0.5 * float(np.percentile(light, 90)) and dark > 2 * DARK:
        return Field((0, 0, image.width, image.height), None)  # the corners are retina too
    best: tuple[float, Ellipse] | None = None
    for step in _STEPS:
        component = _largest(light > dark + step)
        if component is None:
            break
        points, cut = _boundary(component)
        if step == _STEPS[0] and cut > 0.97 and flat is None:
            return Field((0, 0, image.width, image.height), None)  # it reaches the frame whichever way one looks
        ellipse = _fitted(points) if len(points) >= 12 else None
        if ellipse is None or not _plausible(ellipse, component):
            continue
        strength = _edge_strength(light, ellipse)
        if best is None or strength > best[0] + 0.02:
            best = (strength, ellipse)
        if strength > 0.95:
            break
    if best is None or best[0] < 0.25:
        raise Rejected("too_dark" if float(np.percentile(light, 99)) < 2 * DARK else "no_field_of_view")
    x, y, a, b = _refined(light, best[1])
    # Pixel (0, 0) of the small copy has its centre at 0.5.
    disc = Ellipse((x + 0.5) * scale_x, (y + 0.5) * scale_y, (a - _MARGIN) * scale_x, (b - _MARGIN) * scale_y)
    left, top, right, bottom = (0, 0, *small.size) if flat is None else _free_part(flat, best[1])
    frame = (round(left * scale_x), round(top * scale_y), round(right * scale_x), round(bottom * scale_y))
    return Field(frame, disc)


def _reduced(image: Image.Image) -> tuple[Image.Image, float, float]:
    """A copy with `FIND_SIDE` pixels at the longer side, and how many source pixels stand for one of its."""
    factor = max(image.size) / FIND_SIDE
    size = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
    # Whole-numbered averaging first: several times as fast, and what is left for the exact step is small.
    small = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0) if factor > 1 else image.resize(size)
    return small, image.width / size[0], image.height / size[1]


def _flat_frame(values: np.ndarray) -> np.ndarray | None:
    """(height, width) bool: what a page's white, or another flat bright colour, covers from the corners inwards."""
    flat = np.zeros(values.shape[:2], bool)
    for rows in (slice(0, 3), slice(-3, None)):
        for columns in (slice(0, 3), slice(-3, None)):
            corner = values[rows, columns].reshape(-1, 3)
            colour = np.median(corner, axis=0)
            retinal = colour[0] > colour[2] + 30  # warm colours are the field itself, reaching into the corner
            if colour.max() < _BRIGHT_FRAME or retinal or np.abs(corner - colour).max() > _FLAT:
                continue
            parts, _ = ndimage.label(np.abs(values - colour).max(axis=2) <= _FLAT)
            flat |= parts == parts[rows, columns][1, 1]
    return ndimage.binary_dilation(flat, iterations=2) if flat.any() else None  # with the frame's blurred edge


def _free_part(flat: np.ndarray, ellipse: Ellipse) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what a flat frame that cuts the disc leaves of it."""
    inside = ellipse_mask(ellipse, flat.shape)
    limits = []
    for axis in (0, 1):
        chord = inside.sum(axis=axis)
        free = np.flatnonzero((chord > 0) & ((flat & inside).sum(axis=axis) <= 0.05 * chord))
        limits.append((int(free[0]), int(free[-1]) + 1) if len(free) else (0, len(chord)))
    (left, right), (top, bottom) = limits
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
    """The component's last pixel on each ray from its centre: (n, 2) x and y; and the share cut by the frame."""
    height, width = component.shape
    y, x = (float(np.mean(index)) for index in np.nonzero(component))
    angles = np.arange(_RAYS) * (2 * np.pi / _RAYS)
    radii = np.arange(0.0, np.hypot(height, width))
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
        if more > 1.2 * inliers:
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
        bad = ~((s > 0.4) & (s < 2.5) & (a > 0.2) & (a < 5))
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
    """The ellipse holds the component, and the component a good part of what the frame shows of the ellipse.

    A disc too large for the frame to show its corners is none: a straight edge lies on a large circle too.
    """
    if max(ellipse.a, ellipse.b) > 0.8 * max(component.shape):
        return False
    inside = ellipse_mask(ellipse, component.shape)
    both = int((inside & component).sum())
    return both >= 0.94 * int(component.sum()) and both >= 0.35 * int(inside.sum()) and inside.mean() > 0.1


def ellipse_mask(ellipse: Ellipse, shape: tuple[int, ...]) -> np.ndarray:
    """(height, width) bool: pixels whose centre is in the ellipse, with pixel centres at whole numbers."""
    x = ((np.arange(shape[1]) - ellipse.x) / ellipse.a) ** 2
    y = ((np.arange(shape[0]) - ellipse.y) / ellipse.b) ** 2
    return np.asarray(y[:, None] + x[None, :] <= 1)


def _across(light: np.ndarray, ellipse: Ellipse) -> np.ndarray:
    """(n, 9) brightness from 4 pixels inside the ellipse to 4 outside, at the angles where the frame shows both."""
    angles = np.arange(_RAYS) * (2 * np.pi / _RAYS)
    offsets = np.arange(-4, 5)
    column = np.rint(ellipse.x + np.outer(np.cos(angles), ellipse.a + offsets)).astype(np.intp)
    row = np.rint(ellipse.y + np.outer(np.sin(angles), ellipse.b + offsets)).astype(np.intp)
    there = (column >= 0) & (column < light.shape[1]) & (row >= 0) & (row < light.shape[0])
    shown = there.all(axis=1)
    return np.asarray(light[row[shown], column[shown]])


def _edge_strength(light: np.ndarray, ellipse: Ellipse) -> float:
    """How much brighter it is just inside than just outside, 0 to 1, over what the frame shows of the ellipse."""
    across = _across(light, ellipse)
    return float(np.clip((across[:, 0] - across[:, -1]) / 12, 0, 1).mean()) if len(across) >= 8 else 0.0


def _refined(light: np.ndarray, ellipse: Ellipse) -> Ellipse:
    """The ellipse half way between the brightness inside and outside: a low step lies outside a bright edge."""
    across = _across(light, ellipse)
    profile = across[across[:, 0] - across[:, -1] > 4].mean(axis=0)
    middle = (profile[0] + profile[-1]) / 2
    below = int((profile < middle).argmax())
    shift = below - 4 - (middle - profile[below]) / (profile[below - 1] - profile[below])
    return Ellipse(ellipse.x, ellipse.y, ellipse.a + shift, ellipse.b + shift)


def covered_share(disc: Ellipse, frame: tuple[int, int, int, int]) -> float:
    """The share of the disc's area that lies in the frame."""
    x = np.linspace(-1, 1, 257)
    inside = x[:, None] ** 2 + x[None, :] ** 2 <= 1
    columns, rows = disc.x + disc.a * x, disc.y + disc.b * x
    seen = ((rows >= frame[1]) & (rows <= frame[3]))[:, None] & ((columns >= frame[0]) & (columns <= frame[2]))[None, :]
    return float((inside & seen).sum() / inside.sum())
