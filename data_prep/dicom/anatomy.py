"""Modality and anatomy of an image from its header, as ids of the vocabularies, and where each was found.

BodyPartExamined was wrong in 15 % of the images of one study, so a coded region goes first. What no rule knows is
unknown (-1): nothing is guessed, and no free text is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydicom.dataset import Dataset
from ruamel.yaml.comments import CommentedMap

from data_prep.dicom.header import functional_groups, items, text
from data_prep.dicom.terms import BODY_PARTS, MODALITIES, REGIONS, Region, plain
from data_prep.errors import UserError, nearest
from data_prep.labels import UNKNOWN, VOCABULARIES, vocabulary_id
from data_prep.yaml_file import place, read_mapping

ANATOMY_KEYWORDS = (
    "AnatomicRegionSequence",
    "BodyPartExamined",
    "Modality",
    "SharedFunctionalGroupsSequence",
)
VISIBLE_FACE = frozenset(("brain", "eye"))
SECTIONS = ("body_part", "modality", "series")

_MODALITY_IDS = {name: place for place, name in enumerate(VOCABULARIES["modality"])} | {
    "IVUS": VOCABULARIES["modality"].index("US")
}
_ANATOMY_IDS = {name: place for place, name in enumerate(VOCABULARIES["anatomy"])}
_SERIES = re.compile(r"e[0-9a-f]{32}")


@dataclass(frozen=True)
class AnatomyTable:
    """The user's own rules, asked where the header's standard terms say nothing: key -> anatomy id.

    `series` is asked first (pseudonyms), then `body_part` (as `terms.plain` writes them), then `modality`. `digest`
    is a SHA-256 of what the table says; no name of a file or folder is kept.
    """

    series: dict[str, int]
    body_part: dict[str, int]
    modality: dict[str, int]

    @property
    def digest(self) -> str:
        content = json.dumps([self.series, self.body_part, self.modality], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class Anatomy(NamedTuple):
    """An anatomy id (-1 unknown) and its source: AnatomicRegionSequence, BodyPartExamined, table, or None."""

    id: int
    source: str | None

    @property
    def name(self) -> str | None:
        return None if self.id == UNKNOWN else VOCABULARIES["anatomy"][self.id]


def load_table(path: Path) -> AnatomyTable:
    """Read a table, whose three sections all may be left out.

        body_part: {UPPER EXT: shoulder}
        modality: {MG: breast}
        series: {e0f1...: knee}

    Raises:
        UserError: an unknown section, modality or anatomy, a body part that the standard's own rule decides, or a
            series that is no pseudonym; with file, line and the nearest name.
    """
    content = read_mapping(path)
    sections: dict[str, dict[str, int]] = {name: {} for name in SECTIONS}
    for section, entries in content.items():
        where = place(path, content, section)
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown key {str(section)!r}{nearest(str(section), SECTIONS)}")
        if not isinstance(entries, CommentedMap):
            raise UserError(f"{where}: {section} must map each value to an anatomy")
        for value, anatomy in entries.items():
            where = place(path, entries, value)
            key = _table_key(str(section), str(value), where)
            if key in sections[section]:
                raise UserError(f"{where}: {str(value)!r} stands there already, written in another way")
            sections[section][key] = vocabulary_id("anatomy", str(anatomy), where)
    return AnatomyTable(**sections)


def _table_key(section: str, value: str, where: str) -> str:
    if section == "series":
        if not _SERIES.fullmatch(value):
            raise UserError(f"{where}: a series is named by its pseudonym, 'e' and 32 hexadecimal digits")
        return value
    if section == "modality":
        if value not in MODALITIES:
            raise UserError(f"{where}: unknown modality {value!r}{nearest(value, sorted(MODALITIES))}")
        return value
    key = plain(value)
    known = BODY_PARTS.get(key)
    if known is not None:
        raise UserError(f"{where}: the body part {value!r} always means {known!r}, so this line would do nothing")
    return key


def modality_id(dataset: Dataset) -> int:
    """The id of the image's modality; -1 for one that the vocabulary does not have."""
    return _MODALITY_IDS.get(text(dataset, "Modality"), UNKNOWN)


def regions(dataset: Dataset, frame: int | None = None) -> list[Region]:
    """The known regions of AnatomicRegionSequence, of a frame or else of the whole image (PS3.3 C.7.6.16.2.8)."""
    for group in functional_groups(dataset, "FrameAnatomySequence", frame):
        found = [
            REGIONS.get((text(item, "CodingSchemeDesignator"), text(item, "CodeValue")))
            for item in items(group, "AnatomicRegionSequence")[:8]
        ]
        if found:
            return [region for region in found if region is not None]
    return []


def locate(dataset: Dataset, table: AnatomyTable | None = None, series: str | None = None) -> Anatomy:
    """The image's anatomy.

    Args:
        dataset: the header, with ANATOMY_KEYWORDS at least.
        table: asked where neither the coded region nor the body part says it.
        series: the series' pseudonym, to look up in the table.
    """
    named = {region.anatomy for region in regions(dataset)}
    if len(named) == 1 and None not in named:
        (anatomy,) = named
        return Anatomy(_ANATOMY_IDS[str(anatomy)], "AnatomicRegionSequence")
    part = plain(text(dataset, "BodyPartExamined"))
    known = BODY_PARTS.get(part)
    # A coded region that contradicts, or spans several, is not overruled by the less reliable attribute.
    if known is not None and not named:
        return Anatomy(_ANATOMY_IDS[known], "BodyPartExamined")
    if table is not None:
        for entries, key in (
            (table.series, series),
            (table.body_part, part),
            (table.modality, text(dataset, "Modality")),
        ):
            if key and key in entries:
                return Anatomy(entries[key], "table")
    return Anatomy(UNKNOWN, None)
