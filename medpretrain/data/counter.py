"""Random numbers without state: every draw is a hash of what it is for.

A draw named by (seed, epoch, sample, purpose, ...) has the same value on any number of ranks, in any order, before and
after a resume. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), chained over the words.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = int | NDArray[Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of the 64-bit integers; any shape."""
    with np.errstate(over="ignore"):  # arithmetic is meant modulo 2**64
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def hash64(*words: Words) -> NDArray[np.uint64]:
    """One 64-bit hash an element of the broadcast words; a different order of the words is a different hash."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            number = np.asarray(word).astype(np.int64).view(np.uint64)
            state = mix64(state + _GOLDEN + mix64(number + _GOLDEN))
    return state


def purpose(name: str) -> int:
    """The number that stands for a named use, so that two uses of the same sample never share their draws."""
    return zlib.crc32(name.encode())


def uniform(*words: Words, low: float = 0.0, high: float = 1.0) -> NDArray[np.float64]:
    """Uniform draws in [low, high), 53 bits each.

    >>> bool(uniform(0, 1, 2) == uniform(0, 1, 2)), bool(uniform(0, 1, 2) == uniform(0, 2, 1))
    (True, False)
    """
    unit = (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return low + (high - low) * unit


def normal(*words: Words) -> NDArray[np.float64]:
    """Standard normal draws (Box and Muller 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(*words, 0)))
    return radius * np.cos(2.0 * np.pi * uniform(*words, 1))
