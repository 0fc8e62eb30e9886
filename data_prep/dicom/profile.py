"""De-identification profiles: which attributes leave with an image, and which options of PS3.15 Annex E that makes.

A profile can only narrow: it chooses from KEEPABLE, and nothing it says lets another attribute pass.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from data_prep.dicom.record import KEEPABLE
from data_prep.errors import UserError, nearest
from data_prep.labels import shipped_folder
from data_prep.yaml_file import place, read_mapping

PROFILE_VERSION = 1
CHOICES = {"burned_in": ("refuse",), "ultrasound": ("crop", "refuse")}
DEMOGRAPHICS = ("age", "sex")
KEYS = ("keep", "demographics", *CHOICES)

# Of CID 7050 (PS3.16), what the code does. Never among them: 113101 Clean Pixel Data (undeclared text stays), 113102
# Clean Recognizable Visual Features (faces stay), 113110 Retain UIDs (they are hashed), 113106, 113107 (no dates).
CLAIMS = {
    "113100": "Basic Application Confidentiality Profile",
    "113103": "Clean Graphics Option",
    "113105": "Clean Descriptors Option",
    "113108": "Retain Patient Characteristics Option",
}

_WHY = {
    "PN": "is a person's name",
    "UI": "is a unique identifier, which a PACS finds the patient by",
    **dict.fromkeys(("DA", "DT", "TM"), "is a date or a time"),
    **dict.fromkeys(("LO", "LT", "SH", "ST", "UC", "UR", "UT"), "is free text, which may say anything"),
    **dict.fromkeys(("OB", "OB or OW", "OD", "OF", "OL", "OV", "OW", "UN"), "is binary data"),
    "SQ": "is a sequence, which may hold anything",
}
_TAG = re.compile(r"\(?([0-9A-Fa-f]{4}),? ?([0-9A-Fa-f]{4})\)?")


@dataclass(frozen=True)
class Profile:
    """What leaves: attributes by keyword, sex and ten-year age bins or not, cropped ultrasound or none."""

    name: str
    keep: tuple[str, ...]
    sex: bool
    age: bool
    ultrasound: str

    @property
    def digest(self) -> str:
        """SHA-256 of what the profile says; comments, order and its name do not count."""
        content = [PROFILE_VERSION, sorted(self.keep), self.sex, self.age, self.ultrasound]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def claims(self) -> list[str]:
        """The codes of CID 7050 that describe what is done; CLAIMS has their meanings.

        Graphics and descriptors count as clean because none leaves (E.3.3, E.3.5): overlays and free text are dropped,
        and what stays is written from closed lists.
        """
        codes = ["113100", "113103", "113105"]
        return [*codes, "113108"] if self.sex or self.age else codes


def load_profile(choice: str) -> Profile:
    """Read a profile, given by path or by the name of a shipped one (`strict`).

    Raises:
        UserError: no such profile; an attribute that may not leave, with the reason; an unknown key or value; with
            file, line and the nearest name.
    """
    path = Path(choice)
    if path.suffix not in (".yaml", ".yml"):
        folder = shipped_folder().parent / "deid"
        path = folder / f"{choice}.yaml"
        if not path.is_file():
            hint = nearest(choice, sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(
                f"no de-identification profile is called {choice!r}{hint} (or give the path of a .yaml file)"
            )
    content = read_mapping(path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{place(path, content, key)}: unknown key {str(key)!r}{nearest(str(key), KEYS)}")
    for key in KEYS:
        if key not in content:
            raise UserError(f"{path}: the key {key!r} is missing")
    for key, choices in CHOICES.items():
        if content[key] not in choices:
            hint = nearest(str(content[key]), choices)
            raise UserError(f"{place(path, content, key)}: {key} cannot be {content[key]!r}{hint}")
    demographics = _names(path, content, "demographics")
    for i, name in enumerate(demographics):
        if name not in DEMOGRAPHICS:
            where = place(path, content["demographics"], i)
            raise UserError(f"{where}: unknown demographic {name!r}{nearest(name, DEMOGRAPHICS)}")
    keep = _names(path, content, "keep")
    for i, name in enumerate(keep):
        if name not in KEEPABLE:
            raise UserError(f"{place(path, content['keep'], i)}: {name!r} cannot be kept: {_why_not(name)}")
    return Profile(path.stem, tuple(sorted(keep)), "sex" in demographics, "age" in demographics, content["ultrasound"])


def _names(path: Path, content: Any, key: str) -> list[str]:
    listed = content[key]
    if not isinstance(listed, list):
        raise UserError(f"{place(path, content, key)}: {key} must be a list of names, as [Modality, Rows]")
    names = [str(name) for name in listed]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{place(path, listed, i)}: {name!r} stands there twice")
    return names


def _why_not(name: str) -> str:
    """Why an attribute, by keyword or tag, is not among those that may leave."""
    if name in ("PatientSex", "PatientAge"):
        return f"write demographics: [{name.removeprefix('Patient').lower()}] instead"
    match = _TAG.fullmatch(name)
    tag = int(match[1] + match[2], 16) if match else tag_for_keyword(name)
    if tag is None:
        return f"there is no such attribute{nearest(name, sorted(KEEPABLE))}"
    if tag >> 16 & 1:
        return "it is a private attribute, which may say anything"
    if match and keyword_for_tag(tag) in KEEPABLE:
        return f"write its keyword, {keyword_for_tag(tag)}"
    if match and not keyword_for_tag(tag):
        return "the standard does not know it"
    return f"it {_WHY.get(dictionary_VR(tag), 'has no closed list of values here')}"
