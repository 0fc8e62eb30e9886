"""No secret of a header comes out: not in records, pseudonyms, labels, reasons, exceptions, logs or warnings."""

from __future__ import annotations

import io
import json
import logging
import traceback
import warnings

import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from pydicom.dataset import Dataset

from data_prep.dicom.header import read_header, silenced
from data_prep.dicom.profile import load_profile
from data_prep.dicom.pseudonyms import Pseudonyms
from data_prep.dicom.record import KEEPABLE, age_bin, describe
from data_prep.dicom.scan import ScanRejected, scan
from tests.data_prep.dicom.planted import CHARACTER_SETS, KINDS, Planted, leaked, plant, planted

PROFILE = load_profile("strict_demographics")
PSEUDONYMS = Pseudonyms(bytes(range(32)))


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def everything_said(file: Planted) -> list[str]:
    """All that scan and describe give back, raise, log and warn for one file."""
    said: list[str] = []
    recorder = _Recorder()
    root = logging.getLogger()
    level, root.level = root.level, logging.DEBUG
    root.addHandler(recorder)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                said.append(repr(scan(file.data, b"", PSEUDONYMS, PROFILE)))
            except ScanRejected as reason:
                said += [repr(reason.identity), reason.code, reason.detail, "".join(traceback.format_exception(reason))]
            with silenced():
                dataset = pydicom.dcmread(io.BytesIO(file.data), force=True)
            said += [json.dumps(describe(dataset, PROFILE, frame)) for frame in range(2)]
    finally:
        root.removeHandler(recorder)
        root.level = level
    return [*said, *recorder.lines, *(str(warning.message) for warning in warned)]


@given(planted())
@example(plant(1, "CT", "ISO_IR 100", in_kept=True, unknown_character_set=True))
@example(plant(2, "enhanced MR", "\\ISO 2022 IR 87", in_kept=True))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_no_secret_comes_out_of_a_header(file):
    assert leaked(file.sentinels, *everything_said(file)) == []


@pytest.mark.parametrize("character_set", CHARACTER_SETS)
@pytest.mark.parametrize("kind", ["CT", "SR"])
def test_the_secrets_are_really_in_the_file(kind, character_set):
    """Otherwise the test above would pass for the wrong reason."""
    file = plant(3, kind, character_set, in_kept=True)
    inside = leaked(file.sentinels, file.data)
    dataset = pydicom.dcmread(io.BytesIO(file.data))
    assert len(inside) > 150
    assert leaked(file.sentinels, str(dataset.PatientID))
    assert leaked(file.sentinels, str(dataset.OriginalAttributesSequence[0].ModifiedAttributesSequence[0].PatientName))
    assert leaked(file.sentinels, file.name)
    assert not set(plant(4, kind).sentinels) & set(plant(5, kind).sentinels)
    assert set(KINDS) >= {"CT", "MR", "CR", "US", "SC"}


def test_a_record_says_what_is_right_in_the_header():
    dataset = read_header(io.BytesIO(plant(7, "CT", "ISO_IR 192").data))
    assert describe(dataset, PROFILE) == {
        "AnatomicRegionSequence": [{"CodeValue": "69536005", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Head"}],
        "BodyPartExamined": "HEAD",
        "Columns": 64,
        "Laterality": "L",
        "Manufacturer": "Siemens",
        "Modality": "CT",
        "PatientAge": "40-49",
        "PatientSex": "F",
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelSpacing": [0.5, 0.5],
        "Rows": 48,
        "SliceThickness": 1.5,
        "ViewPosition": "AP",
    }
    assert "PatientSex" not in describe(dataset, load_profile("strict"))


def test_frames_of_an_enhanced_image_have_their_own_spacing():
    measures, shared, first = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ["0.123456789", "0.5"], "3"
    shared.PixelMeasuresSequence = [measures]
    own = Dataset()
    own.PixelSpacing = ["2", "2"]
    first.PixelMeasuresSequence = [own]
    dataset = Dataset()
    dataset.NumberOfFrames = 2
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [first, Dataset()]
    assert describe(dataset, PROFILE, 0)["PixelSpacing"] == [2, 2]
    second = describe(dataset, PROFILE, 1)
    assert (second["PixelSpacing"], second["SliceThickness"], second["FrameNumber"]) == ([0.123457, 0.5], 3, 2)


@pytest.mark.parametrize(
    "value", [b"SMITH^JOHN", b"nan", b"inf", b"1e400", b"-1", b"1_0", b"\xff\xff", b"1\\2\\3", b""]
)
@pytest.mark.parametrize("keyword", sorted(KEEPABLE))
def test_a_broken_value_is_left_out(keyword, value):
    dataset = Dataset()
    tag = pydicom.tag.Tag(keyword) if pydicom.datadict.tag_for_keyword(keyword) else pydicom.tag.Tag("NumberOfFrames")
    vr = "LO" if value else None
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, vr is None, True)
    assert describe(dataset, PROFILE) == {}


def test_ages_above_ninety_are_one_bin():
    assert [age_bin(age) for age in ("089Y", "090Y", "104Y", "999Y", "045W", "1Y", "", "04YY")] == [
        "80-89", "90+", "90+", "90+", "0-9", None, None, None,
    ]  # fmt: skip
