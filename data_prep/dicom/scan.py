"""One file's header: whose it is, what it shows, and whether it may enter the dataset. Reads no pixels.

Runs over every file of an export, so pydicom is asked for the few attributes that decide.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from pydicom.dataset import Dataset

from data_prep.dicom.anatomy import ANATOMY_KEYWORDS, AnatomyTable, locate, modality_id
from data_prep.dicom.gate import GATE_KEYWORDS, gate, may_show_a_face
from data_prep.dicom.header import element, identifier, numbers, read_header
from data_prep.dicom.profile import Profile
from data_prep.dicom.pseudonyms import Pseudonyms
from data_prep.quarantine import Rejected

SCAN_KEYWORDS = tuple(
    sorted(
        {
            *GATE_KEYWORDS,
            *ANATOMY_KEYWORDS,
            "IssuerOfPatientID",
            "NumberOfFrames",
            "PatientID",
            "SOPInstanceUID",
            "SeriesInstanceUID",
            "SpecificCharacterSet",
            "StudyInstanceUID",
        }
    )
)
MAX_FRAMES = 100_000


class Identity(NamedTuple):
    """The pseudonyms of a file's patient, study, series and instance; None where the file does not say."""

    patient: str | None = None
    study: str | None = None
    series: str | None = None
    instance: str | None = None


@dataclass(frozen=True)
class Scanned:
    """A file that may enter the dataset.

    Attributes:
        name: the file's name as `walk` gave it; private.
        identity: whose it is, in pseudonyms.
        person: the pseudonym of PatientID alone. Some files of a patient may lack the issuer, which parts the patient's
            pseudonym in two; this one stays, so it decides the split.
        frames: how many images it holds, at least 1.
        modality: id in the vocabulary, -1 unknown.
        anatomy: id in the vocabulary, -1 unknown.
        anatomy_source: AnatomicRegionSequence, BodyPartExamined, table, or None.
        face_risk: a face could be rebuilt from its series.
    """

    name: bytes
    identity: Identity
    person: str | None
    frames: int
    modality: int
    anatomy: int
    anatomy_source: str | None
    face_risk: bool


class ScanRejected(Rejected):
    """A file that may not enter the dataset, with the pseudonyms known of it."""

    def __init__(self, code: str, detail: str, identity: Identity) -> None:
        super().__init__(code, detail)
        self.identity = identity

    def __reduce__(self) -> tuple[type[ScanRejected], tuple[str, str, Identity]]:
        return ScanRejected, (self.code, self.detail, self.identity)


def scan(
    file: BinaryIO | bytes,
    name: bytes,
    pseudonyms: Pseudonyms,
    profile: Profile,
    table: AnatomyTable | None = None,
    reviewed: frozenset[str] = frozenset(),
) -> Scanned:
    """Read a file's header and decide.

    Args:
        file: seekable, at its start; or its bytes.
        name: what `walk` called it; only handed on.
        pseudonyms: makes the identity.
        profile: decides on ultrasound.
        table: the user's rules on anatomy.
        reviewed: instance pseudonyms whose pixels a human has approved.

    Raises:
        ScanRejected: with the reason.
    """
    identity = Identity()
    try:
        dataset = read_header(io.BytesIO(file) if isinstance(file, bytes) else file, SCAN_KEYWORDS)
        identity = identify(dataset, pseudonyms)
        gate(dataset, profile, identity.instance in reviewed)
        frames = _frames(dataset)
    except Rejected as reason:
        raise ScanRejected(reason.code, reason.detail, identity) from None
    anatomy = locate(dataset, table, identity.series)
    return Scanned(
        name,
        identity,
        pseudonyms.patient(identifier(dataset, "PatientID")),
        frames,
        modality_id(dataset),
        anatomy.id,
        anatomy.source,
        may_show_a_face(dataset, anatomy.name),
    )


def identify(dataset: Dataset, pseudonyms: Pseudonyms) -> Identity:
    """The pseudonyms of a header."""
    return Identity(
        pseudonyms.patient(identifier(dataset, "PatientID"), identifier(dataset, "IssuerOfPatientID")),
        pseudonyms.study(identifier(dataset, "StudyInstanceUID")),
        pseudonyms.series(identifier(dataset, "SeriesInstanceUID")),
        pseudonyms.instance(identifier(dataset, "SOPInstanceUID")),
    )


def _frames(dataset: Dataset) -> int:
    """NumberOfFrames; 1 where it is absent or empty."""
    found = element(dataset, "NumberOfFrames")
    if found is None or not found.value:
        return 1
    count = numbers(dataset, "NumberOfFrames")
    if len(count) != 1 or not count[0].is_integer() or not 1 <= count[0] <= MAX_FRAMES:
        raise Rejected("bad_header", "the number of frames")
    return int(count[0])
