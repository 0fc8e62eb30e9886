"""From stored values to brightness: the modality and VOI transformations of DICOM (PS3.3 C.11.1 and C.11.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

from data_prep.dicom.attributes import first_item, guarded, numbers, text
from data_prep.quarantine import Rejected

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_BAD = "bad_window"


@dataclass(frozen=True)
class Lut:
    """A look-up table: entry 0 is for the value `first` and all below, the last one for all above.

    `entries` are little-endian uint16, `bits` is how many of them count.
    """

    first: int
    bits: int
    entries: bytes

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """The entries for `values`, float64 to float64; values between integers take the lower entry."""
        entries = np.frombuffer(self.entries, "<u2")
        places = np.clip(np.floor(values) - self.first, 0, len(entries) - 1).astype(np.intp)
        return entries[places].astype(np.float64)


@dataclass(frozen=True)
class Modality:
    """Stored values to what the modality measures, such as Hounsfield units; `hounsfield` is for CT only to trust."""

    slope: float = 1.0
    intercept: float = 0.0
    lut: Lut | None = None
    hounsfield: bool = False

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """Measured values, float64."""
        if self.lut is not None:
            return self.lut.look_up(stored)
        return stored * self.slope + self.intercept


@dataclass(frozen=True)
class Window:
    """A window of PS3.3 C.11.2.1.2 and C.11.2.1.3.

    Raises:
        Rejected: the width is below what its function allows, or the function is unknown.
    """

    centre: float
    width: float
    function: str = "LINEAR"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise Rejected(_BAD, "an unknown VOILUTFunction")
        if self.width <= 0 or (self.function == "LINEAR" and self.width < 1):
            raise Rejected(_BAD, "a window of no width")

    def __str__(self) -> str:
        function = "" if self.function == "LINEAR" else f"/{self.function}"
        return f"{self.centre:.10g}/{self.width:.10g}{function}"

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Brightness from 0 to 1, float64."""
        if self.function == "SIGMOID":
            # 1 / (1 + exp(-x)) in a form that cannot overflow.
            return 0.5 + 0.5 * np.tanh(2 * (values - self.centre) / self.width)
        if self.function == "LINEAR_EXACT":
            return np.clip((values - self.centre) / self.width + 0.5, 0, 1)
        middle = self.centre - 0.5
        if self.width == 1:
            return np.where(values > middle, 1.0, 0.0)
        return np.clip((values - middle) / (self.width - 1) + 0.5, 0, 1)


@dataclass(frozen=True)
class Range:
    """From black at `low` to white at `high`, low < high."""

    low: float
    high: float

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Brightness from 0 to 1, float64."""
        return np.clip((values - self.low) / (self.high - self.low), 0, 1)


@dataclass(frozen=True)
class VoiLut:
    """A look-up table of PS3.3 C.11.2.1.1, whose entries span black to white by their `bits`."""

    lut: Lut

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Brightness from 0 to 1, float64."""
        return np.clip(self.lut.look_up(values) / (2**self.lut.bits - 1), 0, 1)


def frame_groups(dataset: Dataset, number: int) -> list[Dataset]:
    """Where attributes of a frame may stand: its own functional groups, then the shared ones.

    Raises:
        Rejected: there are fewer functional groups than frames.
    """
    code = "bad_pixel_header"
    places = []
    with guarded(code, "PerFrameFunctionalGroupsSequence cannot be read"):
        own = dataset.get("PerFrameFunctionalGroupsSequence")
        if own:
            if number >= len(own):
                raise Rejected(code, "fewer functional groups than frames")
            places.append(own[number])
    shared = first_item(dataset, "SharedFunctionalGroupsSequence", code)
    return places if shared is None else [*places, shared]


def read_modality(dataset: Dataset, number: int, signed: bool) -> Modality:
    """The modality transformation of a frame; the identity where the file has none.

    Raises:
        Rejected: it cannot be used.
    """
    place = dataset
    for group in frame_groups(dataset, number):
        item = first_item(group, "PixelValueTransformationSequence", _BAD)
        if item is not None:
            place = item
            break
    item = first_item(place, "ModalityLUTSequence", _BAD)
    if item is not None:
        return Modality(lut=_read_lut(item, signed))
    slope = numbers(place, "RescaleSlope", _BAD)
    intercept = numbers(place, "RescaleIntercept", _BAD)
    if not slope and not intercept:
        return Modality()
    if slope[:1] == [0.0]:
        raise Rejected(_BAD, "RescaleSlope is 0")
    kind = text(place, "RescaleType", _BAD)
    return Modality((slope or [1.0])[0], (intercept or [0.0])[0], hounsfield=kind in ("", "HU"))


def read_voi(dataset: Dataset, number: int, signed: bool) -> Window | VoiLut | None:
    """The file's own look-up table or window of a frame, the first of several, or None.

    Args:
        dataset: the whole file.
        number: the frame, from 0.
        signed: the measured values may be below 0.

    Raises:
        Rejected: it cannot be used.
    """
    place = dataset
    for group in frame_groups(dataset, number):
        item = first_item(group, "FrameVOILUTSequence", _BAD)
        if item is not None:
            place = item
            break
    item = first_item(place, "VOILUTSequence", _BAD)
    if item is not None:
        return VoiLut(_read_lut(item, signed))
    centre = numbers(place, "WindowCenter", _BAD)
    width = numbers(place, "WindowWidth", _BAD)
    if not centre and not width:
        return None
    if not centre or not width:
        raise Rejected(_BAD, "a window without centre or width")
    return Window(centre[0], width[0], text(place, "VOILUTFunction", _BAD) or "LINEAR")


def _read_lut(item: Dataset, signed: bool) -> Lut:
    """One item of a Modality or VOI LUT Sequence (PS3.3 C.11.1.1, C.11.2.1.1)."""
    descriptor = numbers(item, "LUTDescriptor", _BAD)
    if len(descriptor) != 3:
        raise Rejected(_BAD, "LUTDescriptor has not three values")
    count, first, bits = (int(value) for value in descriptor)
    count = count or 1 << 16
    if not 8 <= bits <= 16 or count < 1:
        raise Rejected(_BAD, "LUTDescriptor is out of its range")
    if signed and first > 0x7FFF:  # it was read as unsigned
        first -= 1 << 16
    with guarded(_BAD, "LUTData cannot be read"):
        data = item.get("LUTData")
        if isinstance(data, bytes):
            little = item.original_encoding[1] is not False
            if bits == 8 and len(data) in (count, count + count % 2):
                entries = np.frombuffer(data, np.uint8)[:count]
            else:
                entries = np.frombuffer(data, "<u2" if little else ">u2")
        else:
            entries = np.asarray(data)
            if bits == 8 and len(entries) == -(-count // 2) < count:  # two entries a word
                entries = entries.astype("<u2").view(np.uint8)[:count]
        if len(entries) != count or entries.ndim != 1 or entries.min() < 0:
            raise Rejected(_BAD, "LUTData has not the announced length")
        if entries.max() >= 1 << bits:
            raise Rejected(_BAD, "LUTData has more bits than announced")
        return Lut(first, bits, entries.astype("<u2").tobytes())


def padding_values(dataset: Dataset, keyword: str) -> tuple[float, float] | None:
    """The lowest and highest stored value that stand for no pixel (PS3.3 C.7.5.1.1.2), or None.

    Raises:
        Rejected: they cannot be read.
    """
    code = "bad_pixel_header"
    prefix = keyword.removesuffix("PixelData")
    values = numbers(dataset, f"{prefix}PixelPaddingValue", code)
    if not values:
        return None
    values += numbers(dataset, f"{prefix}PixelPaddingRangeLimit", code)
    return min(values), max(values)
