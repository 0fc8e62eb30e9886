"""Palette colour: from stored values to RGB (PS3.3 C.7.6.3.1.5, C.7.6.3.1.6 and C.7.9)."""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from data_prep.dicom.attributes import guarded, numbers
from data_prep.quarantine import Rejected

_COLOURS = ("Red", "Green", "Blue")
_BAD = "bad_window"


def palette_table(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """The colours of `stored` values: (N,) integers to (N, 3) uint8; 16-bit entries give their upper byte.

    Raises:
        Rejected: the palette is missing or damaged.
    """
    descriptors = [numbers(dataset, f"{colour}PaletteColorLookupTableDescriptor", _BAD) for colour in _COLOURS]
    if any(len(descriptor) != 3 for descriptor in descriptors):
        raise Rejected(_BAD, "a palette without descriptor")
    if len({descriptor[0] for descriptor in descriptors}) > 1:
        raise Rejected(_BAD, "palettes of different lengths")
    count, first, bits = (int(value) for value in descriptors[0])
    count = count or 1 << 16
    if count < 1 or bits not in (8, 16):
        raise Rejected(_BAD, "a palette descriptor out of its range")
    if first > 0x7FFF and stored.min() < 0:  # it was read as unsigned
        first -= 1 << 16
    with guarded(_BAD, "a palette cannot be read"):
        if "RedPaletteColorLookupTableData" in dataset:
            entries = np.stack([_plain(dataset, colour, count, bits) for colour in _COLOURS], axis=1)
        else:
            if bits == 8 and count > 256:
                raise Rejected(_BAD, "a segmented palette of more than 256 8-bit entries")
            entries = apply_color_lut(np.arange(count) + first, dataset)[:, :3]
    if len(entries) != count:
        raise Rejected(_BAD, "a palette has not the announced length")
    # Some writers announce 16 bits and fill 8.
    colours = entries >> 8 if entries.max() > 0xFF else entries
    return colours.astype(np.uint8)[np.clip(stored - first, 0, count - 1)]


def _plain(dataset: Dataset, colour: str, count: int, bits: int) -> np.ndarray:
    data = bytes(dataset[f"{colour}PaletteColorLookupTableData"].value)
    if bits == 8 and len(data) in (count, count + count % 2):
        return np.frombuffer(data, np.uint8)[:count]
    big = dataset.original_encoding[1] is False
    return np.frombuffer(data, ">u2" if big else "<u2")
