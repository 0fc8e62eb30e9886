"""Scanning decides from any readable header, names what it refuses, and never fails in another way."""

from __future__ import annotations

import io
import json
import pickle

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from data_prep.dicom.header import PARSE_ERRORS, silenced
from data_prep.dicom.profile import load_profile
from data_prep.dicom.record import describe
from data_prep.dicom.scan import ScanRejected, scan
from data_prep.dicom.walk import opened, walk
from data_prep.labels import VOCABULARIES
from tests.data_prep.dicom.planted import CHARACTER_SETS, KINDS, SYNTAXES, plant


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_encoding_of_a_file_says_the_same(make, encode, pseudonyms, strict, syntax):
    dataset = make(NumberOfFrames=3, BodyPartExamined="KNEE", StudyInstanceUID="1.2.5", PatientID="A 1")
    scanned = scan(encode(dataset, syntax), b"n", pseudonyms, strict)
    assert scanned.identity.patient == pseudonyms.patient("A 1")
    assert scanned.identity.study == pseudonyms.study("1.2.5")
    assert scanned.identity.series is None
    assert (scanned.frames, VOCABULARIES["anatomy"][scanned.anatomy], scanned.face_risk) == (3, "knee", False)
    if syntax not in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
        assert scan(encode(dataset, syntax, preamble=False), b"n", pseudonyms, strict) == scanned


@pytest.mark.parametrize("character_set", [name for name, (_, letters) in CHARACTER_SETS.items() if letters])
def test_a_patient_id_is_the_same_patient_in_every_character_set(make, encode, pseudonyms, strict, character_set):
    name = f"A{CHARACTER_SETS[character_set][1][:4]}7"
    dataset = make(PatientID=name, SpecificCharacterSet=character_set.split("\\"))
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian):
        assert scan(encode(dataset, syntax), b"", pseudonyms, strict).identity.patient == pseudonyms.patient(name)


def test_a_patient_id_that_no_character_set_decodes_still_is_one_patient(make, encode, pseudonyms, strict):
    data = encode(make(PatientID="ABCD", SpecificCharacterSet="ISO_IR 192")).replace(b"ABCD", b"A\xff\xfe\x80")
    first = scan(data, b"", pseudonyms, strict).identity.patient
    other = scan(data.replace(b"A\xff\xfe\x80", b"A\xff\xfe\x81"), b"", pseudonyms, strict).identity.patient
    assert first is not None
    assert first != other


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "not_dicom"),
        (b"Name;Date\n" * 30, "not_dicom"),
        (bytes(128) + b"DICM", "no_sop_class"),
        (bytes(128) + b"DICM" + b"\xff" * 40, "no_sop_class"),
    ],
)
def test_what_is_no_dicom_is_refused_by_name(pseudonyms, strict, data, code):
    with pytest.raises(ScanRejected) as caught:
        scan(data, b"", pseudonyms, strict)
    assert caught.value.code == code


@pytest.mark.parametrize("frames", ["0", "-1", "1.5", "many", "99999999"])
def test_a_frame_count_that_makes_no_sense_is_refused(make, encode, pseudonyms, strict, frames):
    data = encode(make(NumberOfFrames=77777777)).replace(b"77777777", frames.encode().ljust(8))
    with pytest.raises(ScanRejected, match="number of frames"):
        scan(data, b"", pseudonyms, strict)


def test_a_refused_file_still_says_whose_it_is_and_a_review_lets_it_in(make, encode, pseudonyms, strict):
    data = encode(make(BurnedInAnnotation="YES"))
    with pytest.raises(ScanRejected) as caught:
        scan(data, b"", pseudonyms, strict)
    identity = pickle.loads(pickle.dumps(caught.value)).identity
    assert (identity.patient, identity.instance) == (pseudonyms.patient("A-1"), pseudonyms.instance("1.2.3.4"))
    assert scan(data, b"", pseudonyms, strict, reviewed=frozenset([identity.instance])).identity == identity


@pytest.mark.parametrize("kind", KINDS)
def test_every_planted_kind_meets_the_fate_it_should(pseudonyms, strict, kind):
    file = plant(5, kind)
    if file.accepted:
        assert scan(file.data, b"", pseudonyms, strict).frames == (3 if kind == "enhanced MR" else 1)
    else:
        with pytest.raises(ScanRejected):
            scan(file.data, b"", pseudonyms, strict)


def test_damaged_files_are_accepted_or_refused_and_nothing_else(rng, pseudonyms):
    """Flipped, cut and doubled bytes: only ScanRejected may come out of scan, and nothing at all out of describe."""
    profile = load_profile("strict_demographics")
    seeds = [plant(n, kind, syntax=SYNTAXES[n % 4]).data for n, kind in enumerate(("CT", "enhanced MR", "US", "SR"))]
    described = 0
    for _ in range(800):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 4, 40))):
            at = rng.randrange(128, len(data))
            data[at] = rng.choice((0, 0xFF, 0x5C, 0x1B, rng.randrange(256)))
        if rng.random() < 0.2:
            at = rng.randrange(132, len(data))
            data[at:at] = data[at : at + 50]
        if rng.random() < 0.3:
            del data[rng.randrange(132, len(data)) :]
        try:
            scan(bytes(data), b"", pseudonyms, profile)
        except ScanRejected as reason:
            assert reason.message  # noqa: PT017
        try:
            with silenced():
                dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        except (*PARSE_ERRORS, OSError):
            continue
        json.dumps(describe(dataset, profile, frame=rng.randrange(3)), allow_nan=False)
        described += 1
    assert described > 200


def test_real_files_are_named_precisely(real_data, pseudonyms, strict):
    folder = real_data / "dicom"
    fates: dict[str, str] = {}
    for name in walk(folder):
        with opened(folder, name) as file:
            try:
                scan(file, name, pseudonyms, strict)
                fate = "taken"
            except ScanRejected as reason:
                fate = reason.code
        fates[name.decode().split("/")[-1]] = fate
    assert {fate for name, fate in fates.items() if name.startswith("N2D")} == {"taken"}
    assert {fate for name, fate in fates.items() if name.startswith("SC_")} == {"secondary_capture"}
    assert {fate for name, fate in fates.items() if name.startswith("liver")} == {"not_an_image_object"}
    assert {fate for name, fate in fates.items() if name.startswith("emri")} == {"taken"}
    assert fates["OBXXXX1A_rle.dcm"] == "taken"
    assert fates["US1_J2KR.dcm"] == "ultrasound_uncropped"
    assert fates["explicit_VR-UN.dcm"] == "converted"
    assert fates["OT-PAL-8-face.dcm"] == fates["JLSL_RGB_ILV0.dcm"] == "secondary_capture"
