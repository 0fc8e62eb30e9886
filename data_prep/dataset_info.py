"""What dataset.json says: its fields, the one way it is written, and a strict reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError

FORMAT = 2
TOOL = "medpretrain"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vocabulary(_Model):
    """What the ids of a label column mean, and where the labels came from."""

    version: int
    names: list[str]
    source: str


class Duplicates(_Model):
    """Images that stand there more than once, found by their pixels; `dropped` is how many were taken out.

    `kind` says what was looked for: `exact` alone, or `near` too. The counts are of groups and pairs before any was
    dropped, `across_*` of those that join different patients or splits.
    """

    kind: Literal["off", "exact", "near"]
    found: dict[str, int]
    dropped: int


class Deidentification(_Model):
    """By which profile DICOM was de-identified: its content's hash, and the PS3.15 Annex E options claimed, by code."""

    profile: str
    profile_sha256: str
    claims: list[str]
    key_id: str


class ShardInfo(_Model):
    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


class PatientInfo(_Model):
    """Number of patients, of images whose patient is unknown, and of images of the patient who has most."""

    known: int
    images_without: int
    most_images: int


class Statistics(_Model):
    """Mean and standard deviation per channel of the train images, in 0..1; `how` says over which pixels."""

    mean: list[float]
    std: list[float]
    images: int
    how: str


class DatasetInfo(_Model):
    """The content of dataset.json."""

    format: Literal[2]
    created_by: str
    options: dict[str, Any]
    samples: int
    quarantined: int
    reasons: dict[str, int]
    sources: int
    splits: dict[str, int]
    patients: PatientInfo
    labels: dict[str, Vocabulary]
    bit_depth: int
    channels: int
    statistics: Statistics | None
    duplicates: Duplicates
    deidentification: Deidentification | None
    shards: list[ShardInfo]
    index_sha256: str
    quarantine_sha256: str
    checksum: str

    @property
    def patient_key(self) -> str | None:
        """Which key made the patients' pseudonyms; None where they are numbered, anew in each dataset."""
        return self.deidentification.key_id if self.deidentification else self.options.get("key_id")


def canonical(info: Mapping[str, Any]) -> bytes:
    """The one way dataset.json is written, so that any changed byte shows."""
    return (json.dumps(info, sort_keys=True, indent=1) + "\n").encode()


def checksum(info: Mapping[str, Any]) -> str:
    """SHA-256 over all of dataset.json but the checksum itself."""
    return hashlib.sha256(canonical({key: value for key, value in info.items() if key != "checksum"})).hexdigest()


def parse_info(raw: bytes, place: str) -> DatasetInfo:
    """Check and read the bytes of a dataset.json.

    Raises:
        UserError: no JSON, not ours, of another format number, or changed since it was written.
    """
    try:
        content = json.loads(raw)
    except ValueError:
        raise UserError(f"{place} is damaged: no valid JSON") from None
    if not isinstance(content, dict) or not str(content.get("created_by", "")).startswith(TOOL + " "):
        raise UserError(f"{place} was not written by {TOOL}")
    if content.get("format") != FORMAT:
        raise UserError(f"{place}: format {content.get('format')!r}; this version reads format {FORMAT}")
    if content.get("checksum") != checksum(content) or raw != canonical(content):
        raise UserError(f"{place} was changed since it was written: its checksum does not match")
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
