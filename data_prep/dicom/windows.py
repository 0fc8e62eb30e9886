"""Which gray values become black and white: what the user chose, before any file is read."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml.comments import CommentedMap

from data_prep.errors import UserError, nearest
from data_prep.labels import EVERY_CLASS, VOCABULARIES, shipped_folder
from data_prep.yaml_file import place, read_mapping

PERCENTILES = (1.0, 99.0)
_KINDS = ("stored", "percentile", "fixed")
_KEYS = ("centre", "width")


@dataclass(frozen=True)
class WindowChoice:
    """How gray images are windowed.

    Attributes:
        kind: `stored` takes the file's look-up table or window, and percentiles where it has none; `percentile` takes
            percentiles always; `fixed` takes `table` for CT in Hounsfield units, and goes on as `stored` for the rest.
        percentiles: what becomes black and white, in per cent of an image's pixels.
        table: (anatomy, centre, width) in Hounsfield units; the anatomy `*` stands for every other one.
        origin: what a dataset may say of the choice: the user's own file name stays out.
        digest: SHA-256 of the table's file, None without one.
    """

    kind: Literal["stored", "percentile", "fixed"]
    percentiles: tuple[float, float] = PERCENTILES
    table: tuple[tuple[str, float, float], ...] = ()
    origin: str = ""
    digest: str | None = None

    def fixed_window(self, anatomy: str | None) -> tuple[str, float, float] | None:
        """The entry for an anatomy, or the one for `*`, or None."""
        entries = {entry[0]: entry for entry in self.table}
        return entries.get(anatomy or EVERY_CLASS) or entries.get(EVERY_CLASS)


def parse_window(text: str) -> WindowChoice:
    """Read `stored`, `percentile`, `percentile:LOW,HIGH`, `fixed` (the shipped table) or `fixed:TABLE.yaml`.

    Raises:
        UserError: none of these, or the table says something unknown, with its file, line and nearest name.

    >>> parse_window("percentile:0.5,99.5").percentiles
    (0.5, 99.5)
    """
    kind, colon, rest = text.partition(":")
    if kind == "stored" and not colon:
        return WindowChoice("stored", origin=text)
    if kind == "percentile":
        return WindowChoice("percentile", _percentiles(rest, text) if colon else PERCENTILES, origin=text)
    if kind == "fixed":
        path = Path(rest) if colon else shipped_folder().with_name("windows") / "ct.yaml"
        table, digest = _load_table(path)
        origin = f"{'fixed' if colon else 'fixed:ct'} (sha256 {digest[:16]})"
        return WindowChoice("fixed", table=table, origin=origin, digest=digest)
    raise UserError(
        f"--window {text!r}: must be stored, percentile[:LOW,HIGH] or fixed[:TABLE.yaml]{nearest(kind, _KINDS)}"
    )


def _percentiles(text: str, choice: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--window {choice!r}: must be two numbers, as in percentile:1,99") from None
    if not 0 <= low < high <= 100:
        raise UserError(f"--window {choice!r}: the percentiles must be 0 <= LOW < HIGH <= 100")
    return low, high


def _load_table(path: Path) -> tuple[tuple[tuple[str, float, float], ...], str]:
    """The windows of a table and the SHA-256 of its file."""
    content = read_mapping(path)
    names = (*VOCABULARIES["anatomy"], EVERY_CLASS)
    entries = []
    for name, entry in content.items():
        where = place(path, content, name)
        if name not in names:
            raise UserError(f"{where}: unknown anatomy {str(name)!r}{nearest(str(name), names)}")
        entries.append((str(name), *_window(path, entry, where)))
    return tuple(entries), hashlib.sha256(path.read_bytes()).hexdigest()


def _window(path: Path, entry: Any, where: str) -> tuple[float, float]:
    """Centre and width of one entry."""
    if not isinstance(entry, CommentedMap):
        raise UserError(f"{where}: must be a map such as {{centre: 40, width: 80}}")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{place(path, entry, key)}: unknown key {str(key)!r}{nearest(str(key), _KEYS)}")
    values = [entry.get(key) for key in _KEYS]
    for key, value in zip(_KEYS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where}: {key} must be a number")
    centre, width = (float(value) for value in values)
    if width < 1:
        raise UserError(f"{where}: width must be at least 1, not {width:g}")
    return centre, width
