"""What leaves with an image: the allow-listed attributes of its header, each through a closed list or a bounded number.

No value is copied. A code string is looked up and our own constant written; a number is parsed, bounded and rounded;
everything else, and everything broken, is left out without a word. So no attribute can carry a name, whatever the file
says and in whatever character set (PS3.15 Annex E; HIPAA 164.514(b)(2)).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset

from data_prep.dicom import terms
from data_prep.dicom.anatomy import regions
from data_prep.dicom.header import functional_groups, identifier, numbers, text

if TYPE_CHECKING:
    from data_prep.dicom.profile import Profile

Json = str | int | float | list["Json"] | dict[str, "Json"]
Reader = Callable[[Dataset, int], Json | None]

_DIGITS = 6  # significant ones that a measured number keeps: more would carry more than the measure
_MOST_FRAMES = 100_000
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_AGE = re.compile(r"(\d{3})([YMWD])", re.ASCII)


def describe(dataset: Dataset, profile: Profile, frame: int = 0) -> dict[str, Any]:
    """The attributes that the profile keeps, as JSON by keyword; those the file does not say usably are left out.

    Args:
        dataset: the whole header.
        profile: which attributes.
        frame: the frame described, from 0; written as FrameNumber, from 1, where the file has several.
    """
    record: dict[str, Any] = {}
    for keyword in profile.keep:
        value = KEEPABLE[keyword](dataset, frame)
        if value is not None:
            record[keyword] = value
    if profile.sex:
        sex = text(dataset, "PatientSex")
        if sex in terms.SEXES:
            record["PatientSex"] = sex
    if profile.age:
        age = age_bin(text(dataset, "PatientAge"))
        if age is not None:
            record["PatientAge"] = age
    return record


def age_bin(value: str) -> str | None:
    """Ten years' worth of ages, as "40-49"; "90+" above (HIPAA 164.514(b)(2)(i)(C)); None where it is no age (AS).

    >>> age_bin("047Y"), age_bin("018M"), age_bin("103Y"), age_bin("47")
    ('40-49', '0-9', '90+', None)
    """
    match = _AGE.fullmatch(value)
    if match is None:
        return None
    decade = int(int(match[1]) * _YEARS[match[2]]) // 10 * 10
    return "90+" if decade >= 90 else f"{decade}-{decade + 9}"


def _code(keyword: str, known: Set[str], plain: bool = False) -> Reader:
    by_value = {value: value for value in known}

    def read(dataset: Dataset, frame: int) -> Json | None:
        value = text(dataset, keyword)
        return by_value.get(terms.plain(value) if plain else value)

    return read


def _number(keyword: str, low: float, high: float, count: int = 1, macro: str | None = None) -> Reader:
    """`count` finite numbers from low to high; a single one stands alone, several in a list."""

    def read(dataset: Dataset, frame: int) -> Json | None:
        for place in functional_groups(dataset, macro, frame) if macro else (dataset,):
            values = numbers(place, keyword)
            if len(values) == count and all(low <= value <= high for value in values):
                rounded: list[Json] = [_rounded(value) for value in values]
                return rounded[0] if count == 1 else rounded
        return None

    return read


def _rounded(value: float) -> int | float:
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() else short


def _regions(dataset: Dataset, frame: int) -> Json | None:
    found: list[Json] = [
        {"CodeValue": region.sct, "CodingSchemeDesignator": "SCT", "CodeMeaning": region.meaning}
        for region in dict.fromkeys(regions(dataset, frame))
    ]
    return found or None


def _manufacturer(dataset: Dataset, frame: int) -> Json | None:
    return terms.manufacturer(identifier(dataset, "Manufacturer") or "")  # free text in any character set


def _frame_number(dataset: Dataset, frame: int) -> Json | None:
    count = numbers(dataset, "NumberOfFrames")
    return frame + 1 if len(count) == 1 and 1 < count[0] <= _MOST_FRAMES and frame < count[0] else None


_MEASURES = "PixelMeasuresSequence"
# Every attribute that a profile may keep, and how it is read. Millimetres, Tesla and kilovolt, as in PS3.3.
KEEPABLE: dict[str, Reader] = {
    "AnatomicRegionSequence": _regions,
    "BodyPartExamined": _code("BodyPartExamined", terms.BODY_PARTS.keys(), plain=True),
    "Columns": _number("Columns", 1, 65535),
    "FrameNumber": _frame_number,
    "ImageLaterality": _code("ImageLaterality", terms.LATERALITIES),
    "ImagerPixelSpacing": _number("ImagerPixelSpacing", 1e-4, 100, count=2),
    "KVP": _number("KVP", 1, 1000),
    "Laterality": _code("Laterality", terms.LATERALITIES),
    "MagneticFieldStrength": _number("MagneticFieldStrength", 0.01, 30),
    "Manufacturer": _manufacturer,
    "Modality": _code("Modality", terms.MODALITIES),
    "NumberOfFrames": _number("NumberOfFrames", 1, _MOST_FRAMES),
    "PhotometricInterpretation": _code("PhotometricInterpretation", terms.PHOTOMETRIC_INTERPRETATIONS),
    "PixelSpacing": _number("PixelSpacing", 1e-4, 100, count=2, macro=_MEASURES),
    "Rows": _number("Rows", 1, 65535),
    "SliceThickness": _number("SliceThickness", 1e-4, 1000, macro=_MEASURES),
    "SpacingBetweenSlices": _number("SpacingBetweenSlices", 1e-4, 1000, macro=_MEASURES),
    "ViewPosition": _code("ViewPosition", terms.VIEW_POSITIONS),
}
