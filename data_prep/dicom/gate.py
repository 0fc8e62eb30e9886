"""Before any pixel is decoded: is this an image, and may its pixels show who the patient is? Fails closed.

| what the header says                                  | what happens                                          |
| ----------------------------------------------------- | ----------------------------------------------------- |
| a SOP class that is no image, private, or none        | refused, whoever has reviewed it                      |
| BurnedInAnnotation anything but NO or empty           | `burned_in`                                           |
| ImageType or SeriesDescription of a dose page         | `dose_report`                                         |
| ImageType of a saved screen                           | `screen_save`                                         |
| ImageType LABEL, OVERVIEW (slides)                    | `slide_label`                                         |
| Secondary Capture, hardcopy                           | `secondary_capture`                                   |
| any ConversionType                                    | `converted`                                           |
| ultrasound by class or modality                       | cropped to its 2D scan regions, else refused          |
| cameras, endoscopes, C-arms without BurnedIn... NO    | `burned_in_unknown`                                   |
| CR, DX, MG, CT, MR, NM, PET, OPT, BurnedIn... absent  | taken: primary acquisitions hold no text as a rule    |

A human's review of an instance lifts all but the first row. The header is all that is read: text that nobody declared
stays, so the option Clean Pixel Data (113101) is never claimed.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from data_prep.dicom.anatomy import VISIBLE_FACE
from data_prep.dicom.header import element, items, numbers, text, texts
from data_prep.dicom.profile import Profile
from data_prep.dicom.sop_classes import Kind, kind_of, standard_name
from data_prep.quarantine import Rejected

GATE_KEYWORDS = (
    "BurnedInAnnotation",
    "Columns",
    "ConversionType",
    "ImageType",
    "Modality",
    "RecognizableVisualFeatures",
    "Rows",
    "SOPClassUID",
    "SequenceOfUltrasoundRegions",
    "SeriesDescription",
)
# What a human's review lifts.
LIFTED = frozenset(
    (
        "burned_in",
        "burned_in_unknown",
        "converted",
        "dose_report",
        "screen_save",
        "secondary_capture",
        "slide_label",
        "ultrasound_uncropped",
    )
)
LEAST_CUT = 0.05  # share of the image that a crop must take away to be one: a banner is larger
_TWO_DIMENSIONAL = 1  # RegionSpatialFormat, PS3.3 C.8.5.5.1.1; others are curves and bars with their labels
_MOST_REGIONS = 16


class Region(NamedTuple):
    """A rectangle of pixels: columns left to right - 1, rows top to bottom - 1."""

    left: int
    top: int
    right: int
    bottom: int


class Gate(NamedTuple):
    """What may pass: the whole image where `crop` is None, else only these rectangles, top to bottom."""

    crop: tuple[Region, ...] | None


def gate(dataset: Dataset, profile: Profile, reviewed: bool) -> Gate:
    """Let an image's pixels pass, whole or cropped.

    Args:
        dataset: the header, with GATE_KEYWORDS at least.
        profile: says what happens to ultrasound.
        reviewed: a human saw this instance and found nothing in it that says who the patient is.

    Raises:
        Rejected: with the reason of the table above.
    """
    kind = _kind(dataset)
    ultrasound = kind is Kind.ULTRASOUND or not {"US", "IVUS"}.isdisjoint(map(str.upper, texts(dataset, "Modality")))
    regions = _scan_regions(dataset) if ultrasound and profile.ultrasound == "crop" else ()
    if not reviewed:
        _refuse_burned_in(dataset, kind)
        if ultrasound and not regions:
            raise Rejected("ultrasound_uncropped", _why_uncropped(dataset, profile))
    return Gate(regions or None)


def sop_class(dataset: Dataset) -> str:
    """The SOP class UID, from the dataset or else the file's meta information; "" where neither has one."""
    meta = getattr(dataset, "file_meta", None)
    return text(dataset, "SOPClassUID") or (text(meta, "MediaStorageSOPClassUID") if meta is not None else "")


def may_show_a_face(dataset: Dataset, anatomy: str | None) -> bool:
    """Could a face be rebuilt from this image's series: CT, MR or PET of the head, or of nobody knows what.

    Args:
        dataset: the header.
        anatomy: the image's anatomy as the vocabulary says it, None where unknown.
    """
    if text(dataset, "RecognizableVisualFeatures").upper() == "YES":
        return True
    return text(dataset, "Modality") in ("CT", "MR", "PT") and (anatomy is None or anatomy in VISIBLE_FACE)


def _kind(dataset: Dataset) -> Kind:
    uid = sop_class(dataset)
    if not uid:
        raise Rejected("no_sop_class")
    kind = kind_of(uid)
    if kind is Kind.NO_IMAGE:
        raise Rejected("not_an_image_object", standard_name(uid))
    if kind is Kind.PRIVATE:
        raise Rejected("private_object")
    return kind


def _refuse_burned_in(dataset: Dataset, kind: Kind) -> None:
    declared = _raw_words(dataset, "BurnedInAnnotation")
    if declared not in ("", "NO"):
        raise Rejected("burned_in")
    image_type = _raw_words(dataset, "ImageType")
    description = _raw_words(dataset, "SeriesDescription")
    # Whole words, for PROTON_DENSITY is none of them.
    if not {"DOSE", "PROT", "PROTOCOL", "REPORT"}.isdisjoint(re.split(r"[^A-Z0-9]+", image_type)) or any(
        words in description for words in ("DOSE REPORT", "DOSE INFO", "DOSE RECORD", "PATIENT PROTOCOL")
    ):
        raise Rejected("dose_report")
    if any(word in image_type for word in ("SAVE", "SCREEN", "CAPTURE")) or any(
        words in description for words in ("SCREEN SAVE", "SCREENSAVE", "SCREEN SHOT", "SCREENSHOT", "SCREEN CAPTURE")
    ):
        raise Rejected("screen_save")
    if any(word in ("LABEL", "OVERVIEW") for word in image_type.split("\\")):
        raise Rejected("slide_label")
    if kind is Kind.CAPTURED:
        raise Rejected("secondary_capture")
    if _raw_words(dataset, "ConversionType"):
        raise Rejected("converted")
    if kind is Kind.SUSPECT and declared != "NO":
        raise Rejected("burned_in_unknown")


def _raw_words(dataset: Dataset, keyword: str) -> str:
    """All values as one text in capitals, backslashes between them; "?" for what is no text at all.

    Only compared here, so broken and foreign values count as said: anything odd in BurnedInAnnotation is not NO.
    """
    found = element(dataset, keyword)
    value: Any = None if found is None else found.value
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    elif isinstance(value, MultiValue):
        value = "\\".join(part if isinstance(part, str) else "?" for part in value)
    elif not isinstance(value, str):
        return "?"
    return "\\".join(part.strip(" \0\t\r\n") for part in value.upper().replace("_", " ").split("\\"))


def _size(dataset: Dataset) -> tuple[int, int]:
    rows, columns = numbers(dataset, "Rows"), numbers(dataset, "Columns")
    return (int(rows[0]), int(columns[0])) if len(rows) == len(columns) == 1 else (0, 0)


def _scan_regions(dataset: Dataset) -> tuple[Region, ...]:
    """The 2D regions that lie in the image and cut something off, or () if there is none (PS3.3 C.8.5.5).

    One that lies outside, or is no rectangle, makes all of them suspicious.
    """
    rows, columns = _size(dataset)
    regions: list[Region] = []
    for item in items(dataset, "SequenceOfUltrasoundRegions")[:_MOST_REGIONS]:
        if numbers(item, "RegionSpatialFormat") != [_TWO_DIMENSIONAL]:
            continue
        corner = [numbers(item, f"RegionLocation{end}") for end in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
        if any(len(values) != 1 or not values[0].is_integer() for values in corner):
            return ()
        left, top, right, bottom = (int(values[0]) for values in corner)
        # The last column and row belong to the region; some scanners write the size instead.
        if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
            return ()
        region = Region(left, top, min(right + 1, columns), min(bottom + 1, rows))
        area = (region.right - region.left) * (region.bottom - region.top)
        if area > (1 - LEAST_CUT) * rows * columns:
            return ()
        regions.append(region)
    return tuple(sorted(set(regions), key=lambda region: (region.top, region.left, region)))


def _why_uncropped(dataset: Dataset, profile: Profile) -> str:
    if profile.ultrasound != "crop":
        return "the profile refuses ultrasound"
    if not items(dataset, "SequenceOfUltrasoundRegions"):
        return "it has no regions"
    return "its regions are not two-dimensional, lie outside the image, or cut nothing off"
