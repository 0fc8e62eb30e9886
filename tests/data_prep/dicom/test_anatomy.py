"""Labels from headers: the coded region first, then the body part, then the user's table; never a guess."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from data_prep.dicom.anatomy import load_table, locate, modality_id
from data_prep.errors import UserError
from data_prep.labels import UNKNOWN, VOCABULARIES

SERIES = "e" + "0" * 32


def code(value: str, scheme: str) -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, "whatever the file says"
    return [item]


KNEE = code("T-D9200", "SRT")


def located(dataset: Dataset, *rest) -> tuple[str | None, str | None]:
    found = locate(dataset, *rest)
    return found.name, found.source


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"AnatomicRegionSequence": code("72696002", "SCT")}, ("knee", "AnatomicRegionSequence")),
        ({"AnatomicRegionSequence": code("T-D9200", "SRT")}, ("knee", "AnatomicRegionSequence")),
        ({"AnatomicRegionSequence": code("T-D9200", "SCT")}, (None, None)),
        (
            {"AnatomicRegionSequence": code("T-D9200", "SRT"), "BodyPartExamined": "CHEST"},
            ("knee", "AnatomicRegionSequence"),
        ),
        (
            {"AnatomicRegionSequence": code("T-D9200", "SRT") + code("T-28000", "SRT"), "BodyPartExamined": "KNEE"},
            (None, None),
        ),
        ({"AnatomicRegionSequence": code("80891009", "SCT"), "BodyPartExamined": "CHEST"}, (None, None)),
        ({"AnatomicRegionSequence": code("own", "99LOCAL"), "BodyPartExamined": "CHEST"}, ("lung", "BodyPartExamined")),
        ({"BodyPartExamined": "L-Spine "}, ("spine", "BodyPartExamined")),
        ({"BodyPartExamined": "EXTREMITY"}, (None, None)),
        ({"BodyPartExamined": "CHESTABDOMEN"}, (None, None)),
        ({"BodyPartExamined": ["CHEST", "KNEE"]}, (None, None)),
        ({"StudyDescription": "MRI knee left"}, (None, None)),
    ],
)
def test_anatomy_is_what_the_standard_says_or_unknown(make, attributes, expected):
    assert located(make(**attributes)) == expected


def test_frames_of_an_enhanced_image_share_their_anatomy(make):
    shared, anatomy = Dataset(), Dataset()
    anatomy.AnatomicRegionSequence = code("T-A0100", "SRT")
    shared.FrameAnatomySequence = [anatomy]
    dataset = make(SharedFunctionalGroupsSequence=[shared], BodyPartExamined="CHEST")
    assert located(dataset) == ("brain", "AnatomicRegionSequence")


def test_modalities_outside_the_vocabulary_stay_unknown(make):
    names = VOCABULARIES["modality"]
    assert [modality_id(make(Modality=name)) for name in names] == list(range(len(names)))
    assert names[modality_id(make(Modality="IVUS"))] == "US"
    assert {modality_id(make(Modality=name)) for name in ("PT", "OT", "", "ct scan", None)} == {UNKNOWN}


def test_the_users_table_speaks_where_the_header_does_not(make, tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(f"body_part: {{Upper Ext: shoulder}}\nmodality: {{MG: breast}}\nseries: {{{SERIES}: knee}}\n")
    table = load_table(path)
    assert located(make(BodyPartExamined="UPPER_EXT"), table) == ("shoulder", "table")
    assert located(make(BodyPartExamined="UPPER_EXT"), table, SERIES) == ("knee", "table")
    assert located(make(BodyPartExamined="CHEST"), table, SERIES) == ("lung", "BodyPartExamined")
    assert located(make(Modality="MG"), table) == ("breast", "table")
    assert located(make(), table) == (None, None)
    path.write_text(path.read_text().replace("shoulder", "hip"))
    assert load_table(path).digest != table.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("body_part:\n  X: sholder\n", "line 2: unknown anatomy 'sholder'; did you mean 'shoulder'"),
        ("bodypart: {X: hip}\n", "line 1: unknown key 'bodypart'; did you mean 'body_part'"),
        ("body_part: {CHEST: hip}\n", "line 1: .*always means 'lung'"),
        ("modality:\n  MX: hip\n", "line 2: unknown modality 'MX'"),
        ("series:\n  1.2.840.1: hip\n", "line 2: .*pseudonym"),
        ("body_part: {A B: hip, A_B: hip}\n", "line 1: .*already"),
        ("body_part: hip\n", "line 1: .*must map"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_table(path)
