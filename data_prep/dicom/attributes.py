"""Read attributes that describe pixels, whose values may be anything: a number, a list, text, or nothing.

pydicom's errors and warnings quote values, so none of them gets out of here.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException

from data_prep.quarantine import Rejected

# What pydicom and the codecs raise on damaged input. Not a bare except: a bug of ours such as NameError still surfaces.
LIBRARY_ERRORS = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)

# Their loggers too quote values; a handler on the root logger would write them.
for _name in ("pydicom", "pylibjpeg", "openjpeg", "PIL"):
    _logger = logging.getLogger(_name)
    _logger.addHandler(logging.NullHandler())
    _logger.propagate = False


@contextmanager
def guarded(code: str, detail: str) -> Iterator[None]:
    """Turn whatever a library says about the file inside into `Rejected(code, detail)`, and drop its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except LIBRARY_ERRORS:
            raise Rejected(code, detail) from None


def whole_number(dataset: Dataset, keyword: str, code: str, default: int | None = None) -> int:
    """An integer attribute.

    Raises:
        Rejected: absent or empty without a `default`, or no whole number.
    """
    with guarded(code, f"{keyword} cannot be read"):
        value = dataset.get(keyword)
        if value is None or value == "":
            if default is None:
                raise Rejected(code, f"{keyword} is missing")
            return default
        number = int(value)
        if isinstance(value, str | bytes) or number != float(value):
            raise Rejected(code, f"{keyword} cannot be read")
        return number


def numbers(dataset: Dataset, keyword: str, code: str) -> list[float]:
    """The values of a number attribute, none where it is absent or empty.

    Raises:
        Rejected: a value is no finite number.
    """
    with guarded(code, f"{keyword} cannot be read"):
        value = dataset.get(keyword)
        if value is None or value == "":
            return []
        if isinstance(value, str | bytes):  # of a wrong value representation; a text of digits is a sequence too
            raise Rejected(code, f"{keyword} cannot be read")
        values = [float(part) for part in value] if hasattr(value, "__iter__") else [float(value)]
    if not all(map(math.isfinite, values)):
        raise Rejected(code, f"{keyword} is not finite")
    return values


def text(dataset: Dataset, keyword: str, code: str) -> str:
    """A text attribute, empty where it is absent; the first of several values.

    Raises:
        Rejected: it cannot be read.
    """
    with guarded(code, f"{keyword} cannot be read"):
        value = dataset.get(keyword)
        if value is not None and not isinstance(value, str):
            value = value[0]
        return "" if value is None else str(value).strip(" \0")


def first_item(dataset: Dataset, keyword: str, code: str) -> Dataset | None:
    """The first item of a sequence, None where there is none.

    Raises:
        Rejected: it is no sequence.
    """
    items: Any
    with guarded(code, f"{keyword} cannot be read"):
        items = dataset.get(keyword)
        if not items:
            return None
        item = items[0]
        if not isinstance(item, Dataset):
            raise Rejected(code, f"{keyword} cannot be read")
        return item
