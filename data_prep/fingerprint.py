"""What tells an image from others: a digest of its exact pixels, and a hash that survives re-encoding and resizing."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import xxhash

_LUMA = np.array([19595, 38470, 7471], np.float32)  # of 65,536: ITU-R BT.601, rounded as Pillow does
NO_PHASH = 0  # no real hash is 0: half of the 64 coefficients lie above their median
THIN_SIDE = 128
# An image whose lowest spatial frequencies together have an amplitude below this many gray levels is flat.
FLAT = 1.0

# The 8 lowest rows of the cosine transform (DCT-II), in whole numbers: every sum below stays under 2**53, where
# float64 is exact, so the hash is the same on every machine. ImageHash's own product is not, and loads SciPy.
_SCALE = 2**11
_TURNS = np.arange(8)[:, None] * (2 * np.arange(THIN_SIDE) + 1) / (4 * THIN_SIDE)
_COSINES = np.rint(_SCALE * np.cos(2 * np.pi * _TURNS))
_UNIT = (_SCALE * THIN_SIDE) ** 2 / 4  # the coefficient of a pattern of amplitude 1


class Fingerprint(NamedTuple):
    """`digest`: 16 bytes, equal for equal images. `phash`: 64 bits unsigned, few of them differ between near copies.

    `phash` is `NO_PHASH` where there is none: the image is flat, or its pixels were not read.
    """

    digest: bytes
    phash: int


def fingerprint(values: np.ndarray) -> Fingerprint:
    """The fingerprint of decoded pixels.

    The digest (XXH3, 128 bits; no proof against forgery) covers depth, size and pixels. Container, compression and
    metadata are no part of it, and RGB with three equal channels counts as gray. A JPEG's pixels are what libjpeg-turbo
    makes of it, so digests compare within a dataset rather than between decoders.

    The perceptual hash is ImageHash's `phash`: which of the 8x8 lowest cosine frequencies lie above their median. Here
    the image is thinned to 128x128 pixels, not averaged to 32x32: it costs a tenth, and the low frequencies average.
    Mirrored, turned and cropped copies have other hashes. The distance between two hashes is nearly always even.

    Args:
        values: (height, width) uint8 or uint16, or (height, width, 3) uint8, C-contiguous.
    """
    thin = _thinned(values)
    if values.ndim == 3:
        if _is_gray(thin[::16]) and _is_gray(values):  # so that colour pays little for the question
            values = np.ascontiguousarray(values[..., 0])
        thin = _luma(thin)
    return Fingerprint(_digest(values), _phash(thin))


def _thinned(values: np.ndarray) -> np.ndarray:
    """128 x 128 pixels, each the one under the centre of its cell."""
    if not (values.shape[0] % THIN_SIDE or values.shape[1] % THIN_SIDE):  # the same in a third of the time
        down, right = (side // THIN_SIDE for side in values.shape[:2])
        cells = values[down // 2 :: down, right // 2 :: right]
        thin = np.empty(cells.shape, values.dtype)
        for place in np.ndindex(cells.shape[2:]):  # numpy copies single values faster than threes
            thin[:, :, *place] = cells[:, :, *place]
        return thin
    rows, columns = (
        ((2 * np.arange(THIN_SIDE) + 1) * side // (2 * THIN_SIDE)).astype(np.intp) for side in values.shape[:2]
    )
    return values.take(rows, axis=0).take(columns, axis=1)  # in two steps: a third of the time of one


def _luma(values: np.ndarray) -> np.ndarray:
    # All sums stay below 2**24, where float32 counts in ones.
    return (values.astype(np.float32) @ _LUMA + 0x8000).astype(np.int32) >> 16


def _is_gray(values: np.ndarray) -> bool:
    """Whether the three channels are equal everywhere."""
    return bool((values[..., 0] == values[..., 1]).all() and (values[..., 1] == values[..., 2]).all())


def _digest(values: np.ndarray) -> bytes:
    kind = "I;16" if values.dtype == np.uint16 else "L" if values.ndim == 2 else "RGB"
    return _hashed(kind, (values.shape[1], values.shape[0]), np.ascontiguousarray(values).data.cast("B"))


def fingerprint_of_file(data: bytes) -> Fingerprint:
    """The fingerprint of an encoded file that is not decoded: equal for equal files, never equal to one of pixels."""
    return Fingerprint(_hashed("file", (0, 0), data), NO_PHASH)


def _hashed(kind: str, size: tuple[int, int], data: bytes | memoryview) -> bytes:
    hasher = xxhash.xxh3_128(struct.pack("<4sII", kind.encode(), *size))
    hasher.update(data)
    return hasher.digest()


def _phash(thin: np.ndarray) -> int:
    """The hash of (128, 128) values."""
    square = thin.astype(np.float64)
    spectrum = (_COSINES @ square @ _COSINES.T).ravel()
    waves = spectrum[1:]  # without the mean brightness
    if waves @ waves < (FLAT * _UNIT) ** 2:
        return NO_PHASH
    lower, upper = np.partition(spectrum, (31, 32))[31:33]
    return int.from_bytes(np.packbits(2 * spectrum > lower + upper).tobytes(), "big")
