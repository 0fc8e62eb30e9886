"""The gate refuses by name what is no image or may show a name, and lets primary acquisitions pass."""

from __future__ import annotations

import io
from dataclasses import replace

import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep.dicom.gate import LIFTED, Region, gate, may_show_a_face
from data_prep.dicom.profile import Profile
from data_prep.quarantine import Rejected

ROOT = "1.2.840.10008.5.1.4.1.1."
CT, CR, MG, US, SC, OP = (ROOT + end for end in ("2", "1", "1.2", "6.1", "7", "77.1.5.1"))
NO_IMAGES = {
    "66.4": "Segmentation Storage",
    "88.11": "Basic Text SR Storage",
    "88.59": "Key Object Selection Document Storage",
    "9.1.1": "12-lead ECG Waveform Storage",
    "11.1": "Grayscale Softcopy Presentation State Storage",
    "481.3": "RT Structure Set Storage",
    "104.1": "Encapsulated PDF Storage",
    "30": "Parametric Map Storage",
}


def reason(dataset: Dataset, profile: Profile, reviewed: bool = False) -> str:
    with pytest.raises(Rejected) as caught:
        gate(dataset, profile, reviewed)
    return caught.value.code


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"BurnedInAnnotation": "yes"}, "burned_in"),
        ({"BurnedInAnnotation": "Y"}, "burned_in"),
        ({"BurnedInAnnotation": ["NO", "YES"]}, "burned_in"),
        ({"SOPClassUID": SC}, "secondary_capture"),
        ({"SOPClassUID": SC, "BurnedInAnnotation": "NO"}, "secondary_capture"),
        ({"ConversionType": "WSD"}, "converted"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen_save"),
        ({"ImageType": ["DERIVED", "PRIMARY", "OTHER", "screen_save"]}, "screen_save"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, "dose_report"),
        ({"ImageType": ["DERIVED", "SECONDARY", "DOSE_INFO"]}, "dose_report"),
        ({"SeriesDescription": "Dose Report"}, "dose_report"),
        ({"SOPClassUID": OP, "Modality": "OP"}, "burned_in_unknown"),
        ({"SOPClassUID": ROOT + "77.1.6", "ImageType": ["ORIGINAL", "PRIMARY", "LABEL"]}, "slide_label"),
        ({"SOPClassUID": US, "Modality": "US", "BurnedInAnnotation": "NO"}, "ultrasound_uncropped"),
        ({"Modality": "IVUS"}, "ultrasound_uncropped"),
    ],
)
def test_what_may_show_a_name_is_refused_unless_a_human_looked(make, strict, attributes, code):
    assert reason(make(**attributes), strict) == code
    assert code in LIFTED
    assert gate(make(**attributes), strict, reviewed=True).crop is None


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"BurnedInAnnotation": ""},
        {"SOPClassUID": CR, "Modality": "CR"},
        {"SOPClassUID": MG, "Modality": "MG"},
        {"ImageType": ["DERIVED", "SECONDARY"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "PROTON_DENSITY", "NONE"]},
        {"SOPClassUID": OP, "Modality": "OP", "BurnedInAnnotation": "NO"},
    ],
)
def test_primary_acquisitions_pass(make, strict, attributes):
    assert gate(make(**attributes), strict, reviewed=False).crop is None


@pytest.mark.parametrize(("end", "name"), NO_IMAGES.items())
def test_no_review_makes_an_image_of_what_is_none(make, strict, end, name):
    for reviewed in (False, True):
        with pytest.raises(Rejected, match=name) as caught:
            gate(make(SOPClassUID=ROOT + end), strict, reviewed)
        assert caught.value.code == "not_an_image_object"


def test_private_and_missing_classes_have_reasons_of_their_own(make, strict):
    assert reason(make(SOPClassUID="1.2.3.4.5"), strict, reviewed=True) == "private_object"
    assert reason(make(SOPClassUID=None), strict, reviewed=True) == "no_sop_class"
    assert LIFTED.isdisjoint(("private_object", "no_sop_class", "not_an_image_object"))


def scan_region(left: int, top: int, right: int, bottom: int, kind: int = 1) -> Dataset:
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType = kind, 1
    region.RegionLocationMinX0, region.RegionLocationMinY0 = left, top
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = right, bottom
    return region


def test_ultrasound_is_cropped_to_its_pictures_and_not_to_its_curves(make, strict):
    areas = [scan_region(100, 20, 199, 79), scan_region(0, 20, 99, 79), scan_region(0, 80, 199, 99, kind=3)]
    dataset = make(SOPClassUID=US, Modality="US", SequenceOfUltrasoundRegions=areas)
    expected = (Region(0, 20, 100, 80), Region(100, 20, 200, 80))
    assert gate(dataset, strict, reviewed=False).crop == expected
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=True, little_endian=True)
    assert gate(pydicom.dcmread(buffer, force=True), strict, reviewed=False).crop == expected
    assert reason(dataset, replace(strict, ultrasound="refuse")) == "ultrasound_uncropped"


@pytest.mark.parametrize(
    "region",
    [
        scan_region(0, 0, 199, 99),  # cuts nothing off
        scan_region(0, 2, 199, 99),  # leaves the banner
        scan_region(0, 20, 300, 79),  # beyond the image
        scan_region(50, 20, 50, 79),  # no area
        scan_region(0, 20, 99, 79, kind=3),  # a spectrum
    ],
)
def test_a_region_that_is_no_crop_does_not_open_the_gate(make, strict, region):
    dataset = make(SOPClassUID=US, Modality="US", SequenceOfUltrasoundRegions=[region])
    assert reason(dataset, strict) == "ultrasound_uncropped"


def test_a_face_is_possible_in_heads_and_where_nobody_says(make):
    assert may_show_a_face(make(), "brain")
    assert may_show_a_face(make(), None)
    assert not may_show_a_face(make(), "knee")
    assert may_show_a_face(make(RecognizableVisualFeatures="YES"), "knee")
    assert not may_show_a_face(make(Modality="CR"), None)
