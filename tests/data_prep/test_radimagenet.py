"""RadImageNet's published layout: every row read as published, every flaw named with its file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.labels import VOCABULARIES
from data_prep.radimagenet import NO_PATIENTS, SPLITS, US_TABLE, RadImageNet, read_radimagenet

ROWS = {
    "train": [
        ("radiology_ai/CT/lung/normal/lung-normal000001.png", "lung-normal"),
        ("radiology_ai/MR/abd/normal/abd-normal000001.png", "abd-normal"),
        ("radiology_ai/US/liver/usn000001.png", "us-liver"),
        ("radiology_ai/US/thyroid_nodule/usn000002.png", "us-thyroid_nodule"),
    ],
    "val": [("radiology_ai/MR/af/coalition/coalition000001.png", "af-coalition")],
    "test": [("radiology_ai/MR/knee/acl_pathology/acl_pathology000001.png", "knee-acl_pathology")],
}


def write(root: Path, rows: dict[str, list[tuple[str, str]]], head: str = "filename,label") -> Path:
    root.mkdir(exist_ok=True)
    for split in SPLITS:
        lines = [head, *(",".join(row) for row in rows.get(split, []))]
        (root / f"RadiologyAI_{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def named(data: RadImageNet, label: str) -> list[str | None]:
    column = data.labels[label]
    return [column.names[place] if place >= 0 else None for place in column.ids.tolist()]


def refusal(root: Path, table: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_radimagenet(root, table)
    return str(caught.value)


def test_rows_are_read_as_published(tmp_path: Path) -> None:
    data = read_radimagenet(write(tmp_path, ROWS))
    rows = [row for split in SPLITS for row in ROWS[split]]
    assert data.names.to_pylist() == [name for name, _ in rows]
    assert named(data, "class") == [label for _, label in rows]
    assert data.splits.tolist() == [0, 0, 0, 0, 1, 2]
    assert named(data, "modality") == ["CT", "MR", "US", "US", "MR", "MR"]
    assert named(data, "anatomy") == ["lung", "abd", "abd", "thyroid", "af", "knee"]
    assert data.labels["anatomy"].names == list(VOCABULARIES["anatomy"])
    assert US_TABLE in data.labels["anatomy"].source
    assert data.patients is None
    assert data.warnings == (NO_PATIENTS,)


def test_quotes_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, ROWS)
    path = root / "RadiologyAI_train.csv"
    lines = path.read_text().splitlines()
    text = "\r\n".join(",".join(f'"{field}"' for field in line.split(",")) for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert read_radimagenet(root).names.to_pylist()[:4] == [name for name, _ in ROWS["train"]]


def test_ids_of_classes_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    first = read_radimagenet(write(tmp_path / "a", ROWS))
    second = read_radimagenet(write(tmp_path / "b", {split: rows[::-1] for split, rows in ROWS.items()}))
    assert first.labels["class"].names == second.labels["class"].names == sorted(set(named(first, "class")))


def test_an_ultrasound_class_without_an_entry_stays_unknown_and_is_named(tmp_path: Path) -> None:
    rows = {**ROWS, "val": [("radiology_ai/US/elbow/usn000009.png", "us-elbow")] * 1}
    data = read_radimagenet(write(tmp_path, rows))
    assert named(data, "anatomy")[4] is None
    assert "1 of 3 ultrasound classes ('elbow'; 1 images)" in data.warnings[1]


def test_a_table_of_ones_own_replaces_the_shipped_one(tmp_path: Path) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text("liver: {anatomy: abd}\nthyroid_nodule: {modality: US, anatomy: brain}\n")
    data = read_radimagenet(write(tmp_path / "data", ROWS), table)
    assert named(data, "anatomy")[2:4] == ["abd", "brain"]
    assert "mine" not in data.labels["anatomy"].source


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("liver: {anatomy: abd}\nthyroid_nodul: {anatomy: thyroid}\n", 2, "did you mean 'thyroid_nodule'"),
        ("liver: {anatomy: abd}\nthyroid_nodule: {modality: CT}\n", 2, "its modality is US"),
        ("liver: {anatomy: abdo}\n", 1, "did you mean 'abd'"),
    ],
)
def test_a_slip_in_the_table_is_named_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text(text)
    message = refusal(write(tmp_path / "data", ROWS), table)
    assert f"{table}, line {line}:" in message
    assert says in message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("radiology_ai/XR/lung/normal/a.png,x", "unknown modality folder 'XR'"),
        ("radiology_ai/MRI/lung/normal/a.png,x", "unknown modality folder 'MRI'; did you mean 'MR'?"),
        ("radiology_ai/CT/lungs/normal/a.png,x", "unknown region folder 'lungs'; did you mean 'lung'?"),
        ("radiology-ai/CT/lung/normal/a.png,x", "does not begin with 'radiology_ai'"),
        ("radiology_ai/CT/lung/a.png,x", "does not follow the layout"),
        ("radiology_ai/US/abd/liver/a.png,x", "does not follow the layout"),
        ("radiology_ai/US/../a.png,x", "does not follow the layout"),
        ("/radiology_ai/US/liver/a.png,x", "does not begin with 'radiology_ai'"),
        ("radiology_ai/US/liver/usn000001.png,us-liver", "stands there already"),
        (",x", "the filename is empty"),
        ("radiology_ai/US/liver/a.png,", "the label is empty"),
        ("radiology_ai/US/liver/a.png", "has 1 fields, the header 2"),
        ("radiology_ai/US/liver/a.png,x,y", "has 3 fields, the header 2"),
        ('radiology_ai/US/liver/a.png,"x\ny"', "control character or a line break"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_line(tmp_path: Path, row: str, says: str) -> None:
    root = write(tmp_path, ROWS)
    path = root / "RadiologyAI_val.csv"
    good = "radiology_ai/MR/hip/normal/hip-normal{:06d}.png,hip-normal"
    lines = ["filename,label", *(good.format(i) for i in range(7)), row, *(good.format(i) for i in range(7, 12))]
    path.write_text("\n".join(lines) + "\n")
    message = refusal(root)
    assert says in message
    assert f"{path}, line 9:" in message


def test_an_image_in_two_splits_is_refused_and_both_places_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, {**ROWS, "test": ROWS["train"][1:2]})
    message = refusal(root)
    assert f"{root / 'RadiologyAI_test.csv'}, line 2:" in message
    assert f"({root / 'RadiologyAI_train.csv'}, line 3)" in message


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, ROWS, head="filename,labels")
    assert "RadiologyAI_train.csv, line 1: has no column 'label'; did you mean 'labels'?" in refusal(root)
    write(root, ROWS)
    (root / "RadiologyAI_val.csv").unlink()
    assert "RadiologyAI_val.csv does not exist" in refusal(root)
    (root / "RadiologyAI_val.csv").write_bytes(b"")
    assert "RadiologyAI_val.csv is empty" in refusal(root)
    (root / "RadiologyAI_val.csv").write_bytes(b"filename,label\nradiology_ai/US/\xff/a.png,x\n")
    assert "RadiologyAI_val.csv is no readable UTF-8 CSV file" in refusal(root)


def test_many_rows_in_many_chunks_keep_their_order_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.radimagenet._CHUNK", 64)
    organs = ("liver", "kidney", "thyroid", "gb")
    rows = [(f"radiology_ai/US/{organs[i % 4]}/usn{i:06d}.png", organs[i % 4]) for i in range(1000)]
    data = read_radimagenet(write(tmp_path, {"train": rows[:800], "val": rows[800:], "test": []}))
    assert data.names.to_pylist() == [name for name, _ in rows]
    assert named(data, "class") == [organ for _, organ in rows]
    assert np.bincount(data.splits).tolist() == [800, 200]
    rows[990] = rows[70]
    message = refusal(write(tmp_path, {"train": rows[:800], "val": rows[800:]}))
    assert "RadiologyAI_val.csv, line 192:" in message
    assert "RadiologyAI_train.csv, line 72)" in message
