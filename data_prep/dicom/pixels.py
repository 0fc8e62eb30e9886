"""From a parsed DICOM file to 8- or 16-bit training images.

Decode, then the modality transformation, then the window or look-up table, then MONOCHROME1 is inverted: in the images
that come out, more is brighter. Stored values of up to 16 bits go through one table that holds all of these steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from pydicom.dataset import Dataset

from data_prep.dicom.decode import COLOUR, PALETTE, Layout, decoded, read_layout
from data_prep.dicom.grayscale import Modality, Range, VoiLut, Window, padding_values, read_modality, read_voi
from data_prep.dicom.palette import palette_table
from data_prep.dicom.windows import WindowChoice
from data_prep.quarantine import Rejected

_NUMBER = r"-?\d+(\.\d+)?(e[+-]\d+)?"
# What `Frame.window` may say.
WINDOW_USED = re.compile(
    rf"none|constant|scaled:\d+|percentile:{_NUMBER}/{_NUMBER}|stored:lut"
    rf"|(stored|fixed:[a-z*]+):{_NUMBER}/{_NUMBER}(/LINEAR_EXACT|/SIGMOID)?"
)


@dataclass(frozen=True)
class Frame:
    """One image of a file.

    Attributes:
        number: from 0.
        pixels: (height, width) uint8 or uint16, or (height, width, 3) uint8; C-contiguous, perhaps read-only.
        window: what became black and white: `stored:CENTRE/WIDTH[/FUNCTION]` or `stored:lut` by the file,
            `fixed:ANATOMY:CENTRE/WIDTH`, `percentile:LOW/HIGH`; `constant` for an image of one value, which is all 0;
            `scaled:BITS` for colour of more than 8 bits cut to its upper 8; `none` for 8-bit colour and 1-bit gray.
    """

    number: int
    pixels: np.ndarray
    window: str


def frames(
    dataset: Dataset,
    *,
    choice: WindowChoice,
    bits: Literal[8, 16],
    modality: str | None,
    anatomy: str | None,
    regions: Sequence[tuple[int, int, int, int]] | None = None,
) -> Iterator[Frame]:
    """Decode and window the frames of a file, one at a time.

    Brightness is rounded to the nearest integer. Padding pixels (PS3.3 C.7.5.1.1.2) and values that are not finite
    become 0 and do not count for percentiles. Colour is 8-bit whatever `bits` is.

    Args:
        dataset: the parsed file, with its pixel data.
        choice: how gray images are windowed.
        bits: of gray images.
        modality: a name of the vocabulary; Hounsfield windows are for `CT` alone.
        anatomy: a name of the vocabulary.
        regions: boxes (x0, y0, x1, y1), x1 and y1 exclusive; only what lies in them counts and is shown. The image is
            their common bounding box, 0 between them: what may be written there would otherwise be let out.

    Raises:
        Rejected: the file cannot be used; perhaps only after some of its frames were given.
    """
    assert bits in (8, 16)
    layout = read_layout(dataset)
    crop, inside = _crop(layout, regions)
    black = layout.photometric == "MONOCHROME1"
    padding = _padding(dataset, layout)
    colours: dict[_Cells, np.ndarray] = {}
    for number, whole in enumerate(decoded(dataset, layout)):
        array = whole[crop]
        cells = _Cells.of(layout, array.dtype)
        if layout.photometric in COLOUR:
            pixels, used = _colour(array, layout)
        elif layout.photometric == PALETTE:
            if cells not in colours:  # the depth of JPEG-LS may change between frames
                colours[cells] = palette_table(dataset, cells.stored(np.arange(1 << cells.size)))
            pixels, used = colours[cells].take(cells.patterns(array), axis=0), "none"
        elif layout.bits == 1:
            bright = (cells.stored(array.astype(np.int64)) != 0) ^ black
            pixels, used = bright.astype(f"u{bits // 8}") * ((1 << bits) - 1), "none"
        else:
            if number == 0 or "PerFrameFunctionalGroupsSequence" in dataset:
                measure = read_modality(dataset, number, layout.signed)
                voi, name = _voi(dataset, number, layout, measure, choice, modality, anatomy)
                gray = _Gray(measure, voi, padding, black, bits)
            pixels, used = _windowed(array, inside, cells, gray, name, choice.percentiles)
        if inside is not None:
            pixels = np.where(inside if pixels.ndim == 2 else inside[..., None], pixels, pixels.dtype.type(0))
        yield Frame(number, pixels, used)


@dataclass(frozen=True)
class _Cells:
    """How a stored value lies in an array element of `size` bits: in `bits` of them, from bit `shift` on."""

    size: int
    bits: int
    shift: int
    signed: bool

    @classmethod
    def of(cls, layout: Layout, kind: np.dtype) -> _Cells:
        if layout.cells:
            return cls(8 * kind.itemsize, layout.bits, layout.shift, layout.signed)
        return cls(8 * kind.itemsize, 8 * kind.itemsize, 0, kind.kind == "i")

    def stored(self, patterns: np.ndarray) -> np.ndarray:
        """Stored values, int64, of array elements taken as unsigned."""
        values = (patterns.astype(np.int64) >> self.shift) & ((1 << self.bits) - 1)
        return values - ((values >> (self.bits - 1)) << self.bits) if self.signed else values

    @staticmethod
    def patterns(array: np.ndarray) -> np.ndarray:
        """The elements of an integer array taken as unsigned, in whatever byte order."""
        return array.view(array.dtype.str.replace("i", "u"))


@dataclass(frozen=True)
class _Gray:
    """All steps from stored values to brightness."""

    modality: Modality
    voi: Window | VoiLut | Range | None
    padding: tuple[float, float] | None
    invert: bool
    bits: int

    def real(self, stored: np.ndarray) -> np.ndarray:
        """Where stored values are pixels at all, bool."""
        real = np.isfinite(stored)
        if self.padding is not None:
            real &= (stored < self.padding[0]) | (stored > self.padding[1])
        return real

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """Brightness, uint8 or uint16, of stored values."""
        assert self.voi is not None
        real = self.real(stored)
        values = self.modality.apply(np.where(real, stored, 0).astype(np.float64))
        top = (1 << self.bits) - 1
        bright = np.rint(self.voi.apply(values) * top)
        if self.invert:
            bright = top - bright
        return np.where(real, bright, 0).astype(f"u{self.bits // 8}")


@lru_cache(maxsize=8)
def _table(cells: _Cells, gray: _Gray) -> np.ndarray:
    """The brightness of every array element; the slices of a series mostly share one."""
    return gray.apply(cells.stored(np.arange(1 << cells.size)))


def _windowed(
    array: np.ndarray,
    inside: np.ndarray | None,
    cells: _Cells,
    gray: _Gray,
    used: str,
    percentiles: tuple[float, float],
) -> tuple[np.ndarray, str]:
    """Brightness of a gray frame, and the window used: percentiles of what is `inside` where `gray` has none."""
    small = array.dtype.kind != "f" and cells.size <= 16
    if small:
        patterns = cells.patterns(array)
        if gray.voi is not None:
            return _table(cells, gray).take(patterns), used
        counted = patterns.ravel() if inside is None else patterns[inside]
        counts = np.bincount(counted, minlength=int(patterns.max()) + 1)
        present = np.flatnonzero(counts)
        table = np.zeros(len(counts), f"u{gray.bits // 8}")
        stored, counts = cells.stored(present), counts[present]
    elif gray.voi is not None:
        return gray.apply(array), used
    else:
        stored, counts = np.unique(array if inside is None else array[inside], return_counts=True)
    real = gray.real(stored)
    voi, used = _range(gray.modality.apply(stored[real].astype(np.float64)), counts[real], percentiles)
    if voi is None:
        return np.zeros(array.shape, f"u{gray.bits // 8}"), used
    gray = replace(gray, voi=voi)
    if not small:
        return gray.apply(array), used
    table[present] = gray.apply(stored)
    return table.take(patterns), used


def _range(values: np.ndarray, counts: np.ndarray, percentiles: tuple[float, float]) -> tuple[Range | None, str]:
    """Black and white at percentiles of `counts` pixels of each of `values`, and how to name that.

    The p-th percentile is the lowest value that p per cent of the pixels do not exceed, so it occurs in the image.
    Where both are one value, as in an image that is nearly all background, the extremes are taken.
    """
    order = np.argsort(values)
    values, ends = values[order], np.cumsum(counts[order])
    if len(values) < 2:
        return None, "constant"
    for pair in (percentiles, (0.0, 100.0)):
        ranks = [max(0, math.ceil(percent * int(ends[-1]) / 100) - 1) for percent in pair]
        low, high = values[np.searchsorted(ends, ranks, side="right")].tolist()
        if low < high:
            return Range(low, high), f"percentile:{pair[0]:.10g}/{pair[1]:.10g}"
    return None, "constant"


def _voi(
    dataset: Dataset,
    number: int,
    layout: Layout,
    measure: Modality,
    choice: WindowChoice,
    modality: str | None,
    anatomy: str | None,
) -> tuple[Window | VoiLut | None, str]:
    """The window of a gray frame and its name; None for percentiles."""
    # A window of a map of fractions is not to be trusted: LINEAR shifts it by half a unit and asks for a width of 1.
    if choice.kind == "percentile" or layout.keyword != "PixelData":
        return None, ""
    if choice.kind == "fixed" and modality == "CT" and measure.hounsfield:
        entry = choice.fixed_window(anatomy)
        if entry is not None:
            window = Window(*entry[1:])
            return window, f"fixed:{entry[0]}:{window}"
    signed = layout.signed or measure.intercept < 0 or measure.slope < 0
    voi = read_voi(dataset, number, signed)
    return voi, "stored:lut" if isinstance(voi, VoiLut) else f"stored:{voi}"


def _colour(array: np.ndarray, layout: Layout) -> tuple[np.ndarray, str]:
    """RGB of 8 bits. Deeper colour keeps its upper 8 bits, as a screen would show it, and says so."""
    if array.dtype.itemsize == 1 and layout.bits == 8:
        return np.ascontiguousarray(array), "none"
    upper = (array >> (layout.shift + layout.bits - 8)) & 0xFF
    return np.ascontiguousarray(upper.astype(np.uint8)), "none" if layout.bits == 8 else f"scaled:{layout.bits}"


def _padding(dataset: Dataset, layout: Layout) -> tuple[float, float] | None:
    """The range of stored values that are padding; read as unsigned where the pixels are signed, or the reverse."""
    found = padding_values(dataset, layout.keyword)
    if found is None or layout.keyword != "PixelData":
        return found
    ends = []
    for value in found:
        if layout.signed and value > 0x7FFF and layout.bits <= 16:
            value -= 1 << 16
        elif not layout.signed and value < 0:
            value += 1 << 16
        ends.append(value)
    return min(ends), max(ends)


def _crop(
    layout: Layout, regions: Sequence[tuple[int, int, int, int]] | None
) -> tuple[tuple[slice, slice], np.ndarray | None]:
    """The common bounding box of the regions, and what of it lies in them; None for all of it."""
    if not regions:
        return (slice(None), slice(None)), None
    shown = np.zeros((layout.rows, layout.columns), bool)
    for x0, y0, x1, y1 in regions:
        shown[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = True
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    if not len(rows):
        raise Rejected("bad_pixel_header", "the regions lie outside of the image")
    crop = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return crop, None if shown[crop].all() else shown[crop]
