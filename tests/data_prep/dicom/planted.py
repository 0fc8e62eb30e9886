"""DICOM files with a secret in every place where one can stand, for tests that look for them in all that comes out.

A secret ("sentinel") is a text that occurs nowhere else. Text, names, dates, UIDs, numbers, private and unknown
elements, nested sequences, overlays, icons, the preamble, the meta information, the file's and its folder's name: each
gets one of its own. The pixels are real and small, so that an accepted file can be sharded.

`plant` builds one file; `planted` is the hypothesis strategy over all of them.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pydicom
from hypothesis import strategies as st
from pydicom import config
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

_ROOT = "1.2.840.10008.5.1.4.1.1."
# kind -> SOP class, modality, enters the dataset
KINDS: dict[str, tuple[str, str, bool]] = {
    "CT": (_ROOT + "2", "CT", True),
    "MR": (_ROOT + "4", "MR", True),
    "enhanced MR": (_ROOT + "4.1", "MR", True),
    "CR": (_ROOT + "1", "CR", True),
    "DX": (_ROOT + "1.1", "DX", True),
    "MG": (_ROOT + "1.2", "MG", True),
    "OP": (_ROOT + "77.1.5.1", "OP", True),
    "US": (_ROOT + "6.1", "US", True),
    "US without regions": (_ROOT + "6.1", "US", False),
    "OP undeclared": (_ROOT + "77.1.5.1", "OP", False),
    "burned in": (_ROOT + "2", "CT", False),
    "SC": (_ROOT + "7", "OT", False),
    "SEG": (_ROOT + "66.4", "SEG", False),
    "SR": (_ROOT + "88.11", "SR", False),
    "private": ("1.2.826.0.1.3680043.10.999.1", "OT", False),
}
# SpecificCharacterSet -> Python's codec and letters to write secrets with
CHARACTER_SETS: dict[str, tuple[str, str]] = {
    "": ("ascii", ""),
    "ISO_IR 100": ("latin-1", "ÄÖÜßéèñçøåÞð"),
    "ISO_IR 144": ("iso8859-5", "ЖЩЮЯбдфчшъ"),
    "ISO_IR 192": ("utf-8", "Ωψ山田太郎ñжÜ"),
    "GB18030": ("gb18030", "王小东李四张三"),
    "\\ISO 2022 IR 87": ("iso2022_jp", "山田太郎花子東京都"),
}
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
_TEXT = ("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT")


def _words(text: str) -> list[str]:
    return text.split()


_PLANTED_VRS = (*_TEXT, "PN", "UI", "DA", "DT", "TM", "IS", "DS")
_ALWAYS = _words(
    """
    PatientID OtherPatientIDs PatientName PatientBirthDate PatientBirthTime PatientAddress PatientComments
    IssuerOfPatientID AccessionNumber StudyID StudyDate StudyTime SeriesDate ContentDate AcquisitionDateTime
    InstitutionName InstitutionAddress ReferringPhysicianName PhysiciansOfRecord OperatorsName StationName
    StudyDescription SeriesDescription ProtocolName ImageComments DeviceSerialNumber ManufacturerModelName
    SoftwareVersions StudyInstanceUID SeriesInstanceUID SOPInstanceUID FrameOfReferenceUID
    WindowCenterWidthExplanation RequestedProcedureDescription ImagePresentationComments
    LossyImageCompressionMethod
    """
)
_OF_KEPT = _words(
    """
    BodyPartExamined Laterality ImageLaterality ViewPosition Manufacturer SliceThickness KVP
    MagneticFieldStrength SpacingBetweenSlices ImagerPixelSpacing PatientSex PatientAge
    """
)
_IDENTITY = ("PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
ROWS, COLUMNS = 48, 64
FRAMES = {"enhanced MR": 3}
SCAN = (4, 12, 59, 43)  # of an ultrasound image: left, top, right, bottom
_DECIDING = {"ImageType", "SOPClassUID", "Modality", "ConversionType", "SpecificCharacterSet", "NumberOfFrames"}


@dataclass(frozen=True)
class Planted:
    """A file, its secrets, and what should become of it.

    Attributes:
        name: with folders.
        data: its bytes.
        sentinels: every secret in every encoding, those of the name included.
        kind: of KINDS.
        accepted: it may be sharded.
        values: the secrets of the header as they were written, whole: what a bare hash would be taken of.
        of_name: those of `sentinels` that stand in the name alone.
        identity: PatientID, IssuerOfPatientID, StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID.
    """

    name: str
    data: bytes
    sentinels: tuple[bytes, ...]
    kind: str
    accepted: bool
    values: tuple[str, ...] = ()
    of_name: frozenset[bytes] = frozenset()
    identity: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Planted({self.kind!r}, {len(self.data)} bytes, {len(self.sentinels)} sentinels)"


def leaked(sentinels: Sequence[bytes], *outputs: str | bytes) -> list[bytes]:
    """The secrets that occur in any output, in whatever case."""
    blob = b"\n".join(out if isinstance(out, bytes) else out.encode("utf-8", "surrogateescape") for out in outputs)
    blob = blob.lower()
    return [sentinel for sentinel in sentinels if sentinel.lower() in blob]


def planted() -> st.SearchStrategy[Planted]:
    """Files of every kind, character set and transfer syntax."""
    return st.builds(
        plant,
        st.integers(0, 2**32 - 1),
        st.sampled_from(list(KINDS)),
        st.sampled_from(list(CHARACTER_SETS)),
        st.sampled_from(SYNTAXES),
        in_kept=st.booleans(),
        unknown_character_set=st.booleans(),
        headless=st.booleans(),
    )


def plant(
    seed: int,
    kind: str = "CT",
    character_set: str = "",
    syntax: str = ExplicitVRLittleEndian,
    in_kept: bool = False,
    unknown_character_set: bool = False,
    headless: bool = False,
) -> Planted:
    """Build one file.

    Args:
        seed: decides every secret; two seeds share none.
        kind: of KINDS.
        character_set: of CHARACTER_SETS.
        syntax: of SYNTAXES.
        in_kept: secrets also stand in the attributes that a profile keeps, where they are wrong.
        unknown_character_set: SpecificCharacterSet itself is a secret.
        headless: no preamble and no meta information, where the transfer syntax can be told without.
    """
    secrets = _Secrets(seed, character_set)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writing = config.settings.writing_validation_mode
        config.settings.writing_validation_mode = config.IGNORE
        try:
            dataset = _dataset(secrets, kind, character_set, syntax, in_kept)
            identity = tuple(str(dataset[keyword].value) for keyword in _IDENTITY)
            data = _written(dataset, syntax, headless and syntax != DeflatedExplicitVRLittleEndian)
        finally:
            config.settings.writing_validation_mode = writing
    if unknown_character_set and character_set == "ISO_IR 100":
        token = secrets.token()
        data = data.replace(b"ISO_IR 100", token.encode())
    inside = len(secrets.known)
    name = f"{secrets.text()}/{secrets.token()}/{secrets.text()}.dcm"
    sentinels = tuple(dict.fromkeys(secrets.known))
    of_name = frozenset(secrets.known[inside:])
    return Planted(name, data, sentinels, kind, KINDS[kind][2], tuple(secrets.values), of_name, identity)


class _Secrets:
    """Makes secrets and remembers each in every form in which it might come out."""

    def __init__(self, seed: int, character_set: str) -> None:
        self.random = random.Random(seed)
        self.codec, self.letters = CHARACTER_SETS[character_set]
        self.known: list[bytes] = []
        self.values: list[str] = []

    def token(self) -> str:
        token = "ZQ" + "".join(self.random.choices("BCDFGHJKLMNPRSTVWXZ", k=8))
        self.known += [token.encode(), token.encode("utf-16-le")]
        return token

    def text(self) -> str:
        """An ASCII token, and one in the file's own letters."""
        if not self.letters:
            return self.token()
        foreign = "".join(self.random.choices(self.letters, k=6))
        escaped = foreign.encode("ascii", "backslashreplace")
        self.known += [foreign.encode("utf-8"), foreign.encode(self.codec), foreign.encode("utf-16-le"), escaped]
        return f"{self.token()} {foreign}"

    def digits(self, count: int) -> str:
        digits = str(self.random.randrange(10 ** (count - 1), 10**count))
        self.known.append(digits.encode())
        return digits

    def date(self) -> str:
        year, month, day = self.random.randrange(1901, 2000), self.random.randrange(1, 13), self.random.randrange(1, 29)
        self.known += [f"{year}{month:02}{day:02}".encode(), f"{year}-{month:02}-{day:02}".encode()]
        return f"{year}{month:02}{day:02}"

    def time(self) -> str:
        hour, minute, second = (self.random.randrange(top) for top in (24, 60, 60))
        time = f"{hour:02}{minute:02}{second:02}.{self.random.randrange(10**6):06}"
        self.known.append(time.encode())
        return time

    def value(self, vr: str) -> str | bytes:
        value = self._value(vr)
        if isinstance(value, str):
            self.values.append(value)
        return value

    def _value(self, vr: str) -> str | bytes:
        if vr == "PN":
            return f"{self.text()}^{self.text()}"
        if vr == "UI":
            return f"1.2.826.0.1.{self.digits(14)}"
        if vr == "DA":
            return self.date()
        if vr == "TM":
            return self.time()
        if vr == "DT":
            return f"{self.date()}{self.time()}"
        if vr in ("IS", "DS"):
            return self.digits(9)
        if vr in ("UN", "OB", "OW"):
            return self.token().encode() + b"  "
        if vr in ("AE", "CS", "UR"):
            return self.token()
        return self.text()


def _add(dataset: Dataset, tag: int, vr: str, value: object) -> None:
    dataset[Tag(tag)] = DataElement(Tag(tag), vr, value, validation_mode=config.IGNORE)


def _dataset(secrets: _Secrets, kind: str, character_set: str, syntax: str, in_kept: bool) -> Dataset:
    dataset = Dataset()
    if character_set:
        dataset.SpecificCharacterSet = character_set.split("\\")
    chosen = set(secrets.random.sample(list(DicomDictionary), 150)) | {int(Tag(name)) for name in _ALWAYS}
    for tag in sorted(chosen):
        vr, _, _, _, keyword = DicomDictionary[tag]
        structural = tag >> 16 in (0x0000, 0x0002, 0x0004, 0x5200, 0x7FE0, 0xFFFE) or tag < 0x00080005
        harmless = tag >> 16 != 0x0028 or keyword in _ALWAYS
        if vr in _PLANTED_VRS and harmless and not structural and keyword not in (*_OF_KEPT, *_DECIDING):
            _add(dataset, tag, vr, secrets.value(vr))
    _nested(dataset, secrets)
    _private(dataset, secrets)
    _graphics(dataset, secrets)
    _kept(dataset, secrets, in_kept)
    _image(dataset, secrets, kind, syntax)
    return dataset


def _nested(dataset: Dataset, secrets: _Secrets) -> None:
    """Sequences in sequences, as worklists and earlier de-identifiers leave them."""
    code = Dataset()
    for keyword in ("CodeValue", "CodeMeaning", "CodingSchemeDesignator"):
        _add(code, Tag(keyword), "LO", secrets.text())
    request = Dataset()
    _add(request, Tag("ScheduledProcedureStepDescription"), "LO", secrets.text())
    _add(request, Tag("ScheduledPerformingPhysicianName"), "PN", secrets.value("PN"))
    request.ScheduledProtocolCodeSequence = [code]
    dataset.RequestAttributesSequence = [request]
    before = Dataset()
    _add(before, Tag("PatientName"), "PN", secrets.value("PN"))
    _add(before, Tag("PatientID"), "LO", secrets.text())
    original = Dataset()
    original.ModifiedAttributesSequence = [before]
    _add(original, Tag("AttributeModificationDateTime"), "DT", secrets.value("DT"))
    dataset.OriginalAttributesSequence = [original]
    reference = Dataset()
    _add(reference, Tag("ReferencedSOPInstanceUID"), "UI", secrets.value("UI"))
    dataset.ReferencedStudySequence = [reference, original]


def _private(dataset: Dataset, secrets: _Secrets) -> None:
    """A private block with text, bytes and a sequence, and a public tag that nobody knows."""
    _add(dataset, 0x00090010, "LO", secrets.token())
    for offset, vr in enumerate(("LO", "UN", "OB", "PN", "DA", "UT")):
        _add(dataset, 0x00091001 + offset, vr, secrets.value(vr))
    item = Dataset()
    _add(item, 0x00090010, "LO", secrets.token())
    _add(item, 0x00091001, "UN", secrets.value("UN"))
    _add(item, 0x00100010, "PN", secrets.value("PN"))
    _add(dataset, 0x00091010, "SQ", [item])
    _add(dataset, 0x00189AB1, "UN", secrets.value("UN"))
    _add(dataset, 0xFFFCFFFC, "OB", secrets.value("OB"))


def _graphics(dataset: Dataset, secrets: _Secrets) -> None:
    """An overlay and an icon, whose very bytes are secrets."""
    overlay = {
        0x10: ("US", 8), 0x11: ("US", 10), 0x40: ("CS", "G"), 0x50: ("SS", [1, 1]), 0x100: ("US", 1), 0x102: ("US", 0),
    }  # fmt: skip
    for element, (vr, value) in overlay.items():
        _add(dataset, 0x60000000 + element, vr, value)
    for element in (0x22, 0x1500):
        _add(dataset, 0x60000000 + element, "LO", secrets.text())
    _add(dataset, 0x60003000, "OB", secrets.value("OB"))
    icon = Dataset()
    icon.Rows, icon.Columns, icon.SamplesPerPixel, icon.BitsAllocated = 2, 5, 1, 8
    icon.BitsStored, icon.HighBit, icon.PixelRepresentation = 8, 7, 0
    icon.PhotometricInterpretation = "MONOCHROME2"
    _add(icon, 0x7FE00010, "OB", secrets.token().encode())
    dataset.IconImageSequence = [icon]


def _kept(dataset: Dataset, secrets: _Secrets, wrong: bool) -> None:
    """The attributes that leave: right ones, or secrets where they should be."""
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator = "69536005", "SCT"
    _add(region, Tag("CodeMeaning"), "LO", secrets.text())
    dataset.AnatomicRegionSequence = [region]
    if wrong:
        for keyword in _OF_KEPT:
            if secrets.random.random() < 0.7:
                _add(dataset, Tag(keyword), "LO", secrets.text())
        _add(region, Tag("CodeValue"), "SH", secrets.text())
    else:
        dataset.BodyPartExamined, dataset.Laterality, dataset.ViewPosition = "HEAD", "L", "AP"
        _add(dataset, Tag("Manufacturer"), "LO", f"SIEMENS {secrets.text()}")
        dataset.SliceThickness, dataset.PatientSex, dataset.PatientAge = "1.5", "F", "047Y"


def _image(dataset: Dataset, secrets: _Secrets, kind: str, syntax: str) -> None:
    uid, modality, _ = KINDS[kind]
    dataset.SOPClassUID, dataset.Modality, dataset.ImageType = uid, modality, ["ORIGINAL", "PRIMARY"]
    if kind in ("OP", "burned in"):
        dataset.BurnedInAnnotation = "NO" if kind == "OP" else "YES"
    if kind == "SR":
        return
    colour = modality in ("US", "OP")
    frames = FRAMES.get(kind, 1)
    ramp = np.add.outer(np.arange(ROWS), np.arange(COLUMNS))
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 3 if colour else 1
    dataset.PixelRepresentation = 0
    if colour:
        dataset.PhotometricInterpretation, dataset.PlanarConfiguration = "RGB", 0
        pixels = np.stack([ramp, ramp * 2, 255 - ramp], axis=-1).astype(np.uint8)
    else:
        dataset.PhotometricInterpretation = "MONOCHROME1" if kind == "CR" else "MONOCHROME2"
        dataset.PixelSpacing = ["0.5", "0.5"]
        dataset.WindowCenter, dataset.WindowWidth = "800", "1600"
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        # In the upper bits of each cell lies an overlay, as files before 2004 have it.
        overlay = np.random.default_rng(secrets.random.randrange(2**32)).integers(0, 16, (frames, *ramp.shape))
        pixels = np.stack([ramp * 16 + frame for frame in range(frames)]) | overlay << 12
        pixels = pixels.astype(f"{order}u2")
    if kind in ("CT", "burned in"):
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", "-1024", "HU"
    if frames > 1:
        dataset.NumberOfFrames = frames
    bits, stored = (8, 8) if colour else (16, 12)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, stored, stored - 1
    if kind == "US":
        scan = Dataset()
        scan.RegionSpatialFormat, scan.RegionDataType = 1, 1
        scan.RegionLocationMinX0, scan.RegionLocationMinY0 = SCAN[:2]
        scan.RegionLocationMaxX1, scan.RegionLocationMaxY1 = SCAN[2:]
        dataset.SequenceOfUltrasoundRegions = [scan]
    dataset.add_new(0x7FE00010, "OB" if bits == 8 else "OW", pixels.tobytes())


def _written(dataset: Dataset, syntax: str, headless: bool) -> bytes:
    buffer = io.BytesIO()
    if headless:
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        pydicom.dcmwrite(buffer, dataset, implicit_vr=implicit, little_endian=little)
        return buffer.getvalue()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    meta.SourceApplicationEntityTitle = str(dataset.StationName)[:10]
    preamble = str(dataset.StationName)[:10].encode().ljust(128, b"\0")
    file = FileDataset(buffer, dataset, preamble=preamble, file_meta=meta)
    pydicom.dcmwrite(buffer, file, enforce_file_format=False)
    return buffer.getvalue()
