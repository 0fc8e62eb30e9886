"""What tells an image from others: a digest of its exact pixels, and a hash that survives re-encoding and resizing."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image

NO_PHASH = 0  # no real hash is 0: one coefficient of 64 always lies above the median
THIN_SIDE = 128
# An image whose lowest spatial frequencies together deviate less than this (root mean square, in gray levels) is flat.
FLAT = 1.0

_SAMPLED_ROWS = 32  # one row of so many is looked at before all are
# 8 lowest rows of the cosine transform (DCT-II), unscaled, in whole numbers: every sum below stays under 2**53, so
# float64 holds it exactly and the hash is the same on every machine.
_FREQUENCY = np.arange(8)[:, None]
_COSINES = np.rint(2**11 * np.cos(np.pi * _FREQUENCY * (2 * np.arange(THIN_SIDE) + 1) / (2 * THIN_SIDE)))
# A coefficient of amplitude 1 in the picture (but for row or column 0) is this large.
_UNIT = (2**11 * THIN_SIDE) ** 2 / 4


class Fingerprint(NamedTuple):
    """`digest`: 16 bytes, equal for equal images. `phash`: 64 bits unsigned, few of them differ between near copies.

    `phash` is 0 (`NO_PHASH`) where there is none: the image is flat, or its pixels were not read.
    """

    digest: bytes
    phash: int


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an image of mode L, RGB or I;16.

    The digest (XXH3, 128 bits; not proof against forgery) covers depth, size and pixels. Container, compression and
    metadata are no part of it; RGB with three equal channels counts as gray. Of a JPEG these are the pixels of libjpeg's
    accurate decoder, so digests compare within a dataset, not across versions of the decoder.

    The perceptual hash is that of ImageHash's `phash` (the signs of the 8x8 lowest cosine frequencies against their
    median), after thinning to 128x128 pixels instead of averaging to 32x32: a tenth of the cost, and as robust
    to JPEG, resizing and brightness. Mirrored, rotated or cropped copies have other hashes. Distances are even.
    """
    assert image.mode in ("L", "RGB", "I;16"), image.mode
    return Fingerprint(_digest(image), _phash(image))


def fingerprint_of_file(data: bytes) -> Fingerprint:
    """The fingerprint of an encoded file that is not decoded: equal for equal files, never equal to one of pixels."""
    return Fingerprint(_hashed("file", 0, 0, data), NO_PHASH)


def _hashed(kind: str, width: int, height: int, data: bytes) -> bytes:
    hasher = xxhash.xxh3_128(struct.pack("<4sII", kind.encode(), width, height))
    hasher.update(data)
    return hasher.digest()


def _digest(image: Image.Image) -> bytes:
    mode, data = image.mode, image.tobytes()
    if mode == "RGB":
        rows = np.frombuffer(data, np.uint8).reshape(image.height, 3 * image.width)
        if _is_gray(rows[::_SAMPLED_ROWS]) and _is_gray(rows):
            mode, data = "L", rows[:, ::3].tobytes()
    return _hashed(mode, image.width, image.height, data)


def _is_gray(rows: np.ndarray) -> bool:
    """Whether red, green and blue are equal in all pixels of (height, 3 * width), by comparing neighbouring bytes."""
    other_pixel = np.arange(1, rows.shape[1]) % 3 == 0
    return bool(((rows[:, 1:] == rows[:, :-1]) | other_pixel).all())


def _phash(image: Image.Image) -> int:
    thin = image.resize((THIN_SIDE, THIN_SIDE), Image.Resampling.NEAREST)
    if thin.mode == "RGB":
        thin = thin.convert("L")
    values = np.asarray(thin).astype(np.float64)
    spectrum = (_COSINES @ values @ _COSINES.T).ravel()
    lower, upper = np.partition(spectrum, (31, 32))[31:33]
    spectrum_without_mean = spectrum[1:] / _UNIT
    if spectrum_without_mean @ spectrum_without_mean < FLAT**2:
        return NO_PHASH
    return int.from_bytes(np.packbits(2 * spectrum > lower + upper).tobytes(), "big")
