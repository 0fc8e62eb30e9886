"""A profile can only narrow what leaves; what it may not keep it is told, with the line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydicom.sr import codes
from pydicom.sr._snomed_dict import mapping

from data_prep.dicom import terms
from data_prep.dicom.profile import CLAIMS, load_profile
from data_prep.errors import UserError
from data_prep.labels import VOCABULARIES

TEXT = """\
keep:
  - Modality
  - {name}
demographics: []
burned_in: refuse
ultrasound: crop
"""


def write(path: Path, text: str) -> str:
    (path / "mine.yaml").write_text(text)
    return str(path / "mine.yaml")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("PatientName", "person's name"),
        ("StudyInstanceUID", "unique identifier"),
        ("StudyDate", "date or a time"),
        ("StudyDescription", "free text"),
        ("ReferencedStudySequence", "sequence"),
        ("PixelData", "binary"),
        ("0009,1001", "private"),
        ('"(0010,0010)"', "person's name"),
        ('"0028,0010"', "write its keyword, Rows"),
        ("PatientSex", "demographics: .sex."),
        ("Modalty", "did you mean"),
        ("Modality", "twice"),
    ],
)
def test_a_forbidden_attribute_is_refused_with_line_and_reason(tmp_path, name, why):
    with pytest.raises(UserError, match=f"mine.yaml, line 3: .*{why}"):
        load_profile(write(tmp_path, TEXT.format(name=name)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ultrasound: crop", "ultrasound: keep", "line 6: ultrasound cannot be 'keep'.*'crop'"),
        ("burned_in: refuse", "burned_in: warn", "line 5: burned_in cannot be"),
        ("burned_in: refuse", "burnedin: refuse", "line 5: unknown key 'burnedin'; did you mean 'burned_in'"),
        ("demographics: []", "demographics: [sexx]", "line 4: unknown demographic 'sexx'; did you mean 'sex'"),
        ("demographics: []", "demographics: sex", "line 4: .*list"),
        ("ultrasound: crop\n", "", "'ultrasound' is missing"),
        ("ultrasound: crop", "ultrasound: crop\nultrasound: refuse", "line 7"),
        ("keep:", "\tkeep:", "line 1"),
    ],
)
def test_a_slip_of_the_pen_is_named_by_file_and_line(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        load_profile(write(tmp_path, TEXT.format(name="Rows").replace(old, new)))


def test_shipped_profiles_differ_in_demographics_alone_and_claim_what_they_do():
    strict, more = load_profile("strict"), load_profile("strict_demographics")
    assert (strict.sex, strict.age, more.sex, more.age) == (False, False, True, True)
    assert strict.keep == more.keep
    assert strict.digest != more.digest
    assert set(more.claims) - set(strict.claims) == {"113108"}
    assert set(more.claims) == set(CLAIMS)
    assert not {"113101", "113102", "113106", "113110"} & set(more.claims)
    assert pickle.loads(pickle.dumps(more)) == more
    with pytest.raises(UserError, match="did you mean 'strict'"):
        load_profile("strikt")


def test_the_digest_is_of_what_is_said_and_not_of_how(tmp_path):
    plain = load_profile(write(tmp_path, TEXT.format(name="Rows")))
    other = load_profile(write(tmp_path, "# mine\n" + TEXT.format(name="Rows").replace("Modality", "KVP")))
    again = load_profile(write(tmp_path, TEXT.format(name="Modality").replace("- Modality", "- Rows", 1)))
    assert plain.digest == again.digest != other.digest


def test_region_codes_are_the_standards_own():
    """A wrong digit would label knees as thyroids; pydicom's tables hold the same codes."""
    for region in {region.sct: region for region in terms.REGIONS.values()}.values():
        assert region.anatomy is None or region.anatomy in VOCABULARIES["anatomy"]
        if region.srt is not None:
            assert mapping["SCT"][region.sct] == region.srt
            assert mapping["SRT"][region.srt] == region.sct
    thyroid = codes.cid4.Thyroid
    assert terms.REGIONS[("SCT", thyroid.value)].anatomy == "thyroid"
    assert all(anatomy is None or anatomy in VOCABULARIES["anatomy"] for anatomy in terms.BODY_PARTS.values())
