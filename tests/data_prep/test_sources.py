"""Folders, manifests, .npz files and label files: what is read, and what is refused with file and line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.columns import Words
from data_prep.errors import UserError
from data_prep.images import open_source
from data_prep.labels import VOCABULARIES, LabelColumn, apply_class_map, load_class_map, shipped_folder
from data_prep.plan import Base, PlanFile, parse_split, write_plan
from data_prep.sources import Source, with_patient_pattern

Draw = Callable[..., bytes]


@pytest.fixture
def manifest(tmp_path: Path, draw: Draw) -> Callable[[str], Path]:
    """Write a manifest beside the pictures a.png, b.png and c.png."""
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(draw(number))

    def write(text: str) -> Path:
        path = tmp_path / "list.csv"
        path.write_text(text)
        return path

    return write


def test_the_class_is_the_first_folder(tree: Path) -> None:
    source = open_source(tree)
    assert len(source) == 24
    assert source.splits is None
    column = source.labels["class"]
    assert column.names == ["cat", "dog"]
    assert [column.names[i] for i in column.ids] == [name.decode().split("/")[0] for name in source.names.to_pylist()]


def test_split_folders_at_the_top_are_splits_and_not_classes(tmp_path: Path, draw: Draw) -> None:
    for number, split in enumerate(("train", "val")):
        (tmp_path / split / "cat" / "deeper").mkdir(parents=True)
        (tmp_path / split / "cat" / "deeper" / "x.png").write_bytes(draw(number))
    source = open_source(tmp_path)
    assert source.splits is not None
    assert source.splits.to_pylist() == ["train", "val"]
    assert source.labels["class"].names == ["cat"]
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "x.png").write_bytes(draw(3))
    with pytest.raises(UserError, match=r"'valid'; did you mean 'val'"):
        open_source(tmp_path)


def test_a_link_in_a_circle_is_an_error_and_not_an_endless_walk(tree: Path) -> None:
    (tree / "cat" / "up").symlink_to(tree)
    with pytest.raises(UserError, match="a link leads back"):
        open_source(tree)


def test_manifest_columns(manifest: Callable[[str], Path]) -> None:
    path = manifest(
        "path,patient,split,finding,modality\na.png,P1,train,10,MR\nb.png,,val,9,CT\n\nc.png,P2,train,,CT\n"
    )
    source = open_source(path)
    assert source.patients.to_pylist() == ["P1", None, "P2"]
    assert source.splits is not None
    assert source.splits.to_pylist() == ["train", "val", "train"]
    assert source.labels["finding"].names == ["9", "10"]  # as numbers
    assert source.labels["finding"].ids.tolist() == [1, 0, -1]
    assert source.labels["modality"].names == list(VOCABULARIES["modality"])
    assert source.labels["modality"].ids.tolist() == [1, 0, 0]
    assert source.place(2).endswith("list.csv, line 5")
    assert list(open_source(path, ["finding"]).labels) == ["finding"]
    assert not open_source(path, []).labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paht,x\na.png,1\n", r"no column 'path'; did you mean 'paht'"),
        ("path,x\na.png,1\nb.png\n", r"line 3: has 1 fields, the header 2"),
        ("path\na.png\nnowhere.png\n", r"line 3: there is no file 'nowhere.png'"),
        ("path\na.png\n/etc/passwd\n", r"line 3: .* must be relative"),
        ("path\na.png\n./a.png\n", r"line 3: .* stands there already .*line 2"),
        ("path,x\na.png,1\n,2\n", r"line 3: the path is empty"),
        ("path,split\na.png,train\nb.png,\n", r"line 3: the split"),
        ("path,modality\na.png,CT\nb.png,MRI\n", r"line 3: unknown modality 'MRI'; did you mean 'MR'"),
        ('path,x\na.png,1\n"b.png,2\n', r"line 3"),
        ("path,x,x\na.png,1,2\n", r"line 1: column 'x' stands there twice"),
        ("path,a b\na.png,1\n", r"column 'a b': a label's name"),
        ("path\n", r"no images"),
    ],
)
def test_manifest_errors_name_the_line(manifest: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(manifest(text))


def test_parquet_manifest_reads_as_csv_does(manifest: Callable[[str], Path], tmp_path: Path) -> None:
    manifest("")
    table = {"path": ["a.png", "b.png"], "grade": [3, None], "ok": [True, False]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    source = open_source(tmp_path / "list.parquet")
    assert source.labels["grade"].names == ["3"]
    assert source.labels["grade"].ids.tolist() == [0, -1]
    assert source.labels["ok"].names == ["False", "True"]
    pq.write_table(pa.table({"path": ["a.png"], "weight": [0.5]}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match="column 'weight' is double"):
        open_source(tmp_path / "list.parquet")


def test_a_label_column_that_looks_like_an_identifier_is_refused(tmp_path: Path, draw: Draw) -> None:
    lines = ["path,birthday"]
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(draw(number))
        lines.append(f"{number}.png,1950-01-{number + 1:02d}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="'birthday' has 30 values for 30 images"):
        open_source(tmp_path / "list.csv")


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_npz_single_labels_of_either_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images, labels = np.zeros((6, 5, 4), np.uint8), np.array([2, 0, 1, 2, 2, 10]).reshape(shape)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, val_images=images, val_labels=labels)
    source = open_source(tmp_path / "x.npz")
    assert source.labels["class"].names == ["0", "1", "2", "10"]
    assert source.labels["class"].ids.tolist() == [2, 0, 1, 2, 2, 3] * 2
    assert source.splits is not None
    assert source.splits.to_pylist() == ["train"] * 6 + ["val"] * 6


def test_npz_multi_labels_become_binary_columns(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    np.savez_compressed(tmp_path / "x.npz", test_images=np.zeros((2, 5, 4, 3), np.uint8), test_labels=labels)
    source = open_source(tmp_path / "x.npz")
    assert np.array_equal(np.stack([column.ids for column in source.labels.values()], axis=1), labels)
    assert all(column.names == ["0", "1"] for column in source.labels.values())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_imgs": np.zeros((2, 4, 4), np.uint8)}, "no array 'train_images'; did you mean 'train_imgs'"),
        ({"train_images": np.zeros((2, 4, 4), np.float32)}, "train_images is float32"),
        ({"train_images": np.zeros((2, 4, 4, 4), np.uint8)}, "train_images is uint8"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.zeros(3, int)}, "train_labels is int64"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.full((2, 2), 5)}, "must be 0 or 1"),
    ],
)
def test_npz_errors_name_the_array(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.npz")


def test_patient_pattern_errors(tree: Path) -> None:
    source = open_source(tree)
    assert set(with_patient_pattern(source, r"(\d+)_").patients.to_pylist()) == {str(100 + n) for n in range(10)}
    with pytest.raises(UserError, match="needs a group"):
        with_patient_pattern(source, r"\d+_")
    with pytest.raises(UserError, match="unterminated"):
        with_patient_pattern(source, r"(\d+")
    with pytest.raises(UserError, match=r"finds no patient in 'cat/.*_again"):
        with_patient_pattern(source, r"(\d+)_(?:left|right)")
    with pytest.raises(UserError, match="label 'class', which the dataset would show, says the patient's id"):
        with_patient_pattern(source, r"^([a-z]+)/")


def test_a_grade_that_happens_to_equal_some_patients_number_is_fine(manifest: Callable[[str], Path]) -> None:
    source = open_source(manifest("path,patient,grade\na.png,1,2\nb.png,2,1\nc.png,3,1\n"))
    assert source.labels["grade"].names == ["1", "2"]
    with pytest.raises(UserError, match="label 'code', which the dataset would show"):
        open_source(manifest("path,patient,code\na.png,1,1\nb.png,2,2\nc.png,3,\n"))


def planned(folder: Path, source: Source, split: dict[str, float] | None, seed: int, size: int = 5) -> PlanFile:
    return write_plan(folder, source, {"seed": seed}, split, seed, size, Base(), None)


def test_a_patient_is_never_in_two_splits(tree: Path, tmp_path: Path) -> None:
    source = with_patient_pattern(open_source(tree), r"(\d+)_")
    seen = set()
    with pytest.raises(UserError, match="'test' would get none of 24 images, split by patient"):
        planned(tmp_path, source, {"train": 0.999, "test": 0.001}, 0)
    for seed in range(20):
        plan = planned(tmp_path, source, {"train": 0.5, "val": 0.5}, seed)
        homes: dict[bytes, set[str]] = {}
        names = []
        for number in range(len(plan.jobs)):
            job = plan.job(tmp_path, number, 0)
            names += job.names
            for name in job.names:
                homes.setdefault(name.split(b"/")[1].split(b"_")[0], set()).add(job.split)
        assert sorted(names) == source.names.to_pylist()
        assert len(homes) == 10
        assert all(len(splits) == 1 for splits in homes.values())
        seen.add(tuple(names))
    assert len(seen) == 20  # the seed matters


def test_files_of_many_frames_fill_shards_by_images(tree: Path, tmp_path: Path) -> None:
    source = replace(open_source(tree), frames=np.array([3, 1, 30, 2] * 6, np.int32))
    plan = planned(tmp_path, source, None, 0, 8)
    assert sum(job.sources for job in plan.jobs) == 24
    assert sum(job.images for job in plan.jobs) == 36 * 6
    assert all(job.images <= 8 or job.sources == 1 for job in plan.jobs)


def test_images_of_a_group_stay_together_where_the_patient_is_unknown(tree: Path, tmp_path: Path) -> None:
    source = open_source(tree)
    groups = Words().extend([f"study{i // 4}" for i in range(24)]).column()
    plan = planned(tmp_path, replace(source, groups=groups), {"train": 0.5, "val": 0.5}, 1)
    split_of = {}
    for number in range(len(plan.jobs)):
        job = plan.job(tmp_path, number, 0)
        split_of.update(dict.fromkeys(job.names, job.split))
    found = [{split_of[name] for name in source.names.to_pylist()[i : i + 4]} for i in range(0, 24, 4)]
    assert all(len(splits) == 1 for splits in found)
    assert len(set(map(frozenset, found))) == 2


def test_a_patient_in_two_of_the_sources_own_splits_is_refused(manifest: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(manifest("path,patient,split\na.png,P1,train\nb.png,P2,val\nc.png,P1,val\n"))
    with pytest.raises(UserError, match=r"in two splits: 'train' \(.*line 2\) and 'val' \(.*line 4\)"):
        planned(tmp_path, source, None, 0)
    with pytest.raises(UserError, match="brings its own split"):
        planned(tmp_path, source, {"train": 1.0}, 0)


@pytest.mark.parametrize(
    "text", ["train", "train=x", "train=0.5", "train=0.5,train=0.5", "Train=1", "train=1.5,val=-0.5"]
)
def test_a_bad_split_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--split"):
        parse_split(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat: {modality: CT}\ndog: {modality: MRT}\n", r"line 2: unknown modality 'MRT'; did you mean 'MR'"),
        ("cat: {modality: CT}\ndog:\n  anatomie: lung\n", r"line 3: unknown key 'anatomie'; did you mean 'anatomy'"),
        ("cat: {modality: CT}\ndog: {anatomy: lugn}\n", r"line 2: unknown anatomy 'lugn'; did you mean 'lung'"),
        ("cat: CT\n", r"line 1: must be a map"),
        ("cat: {modality: CT\n", r"line 2"),
        ("cat: {modality: CT}\ncat: {modality: MR}\n", r"line 2.*duplicate"),
        ("[]\n", r"must be a mapping"),
    ],
)
def test_labels_file_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "l.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_class_map(str(tmp_path / "l.yaml"))


def test_a_class_without_an_entry_stays_unknown_with_a_warning_and_a_slip_is_an_error(tmp_path: Path) -> None:
    classes = LabelColumn(["cat", "dog"], np.array([0, 1, 1, -1], np.int32), "folder")
    (tmp_path / "l.yaml").write_text("cat: {modality: MR}\n")
    columns, notes = apply_class_map(load_class_map(str(tmp_path / "l.yaml")), classes, 4)
    assert columns["modality"].ids.tolist() == [1, -1, -1, -1]
    assert columns["anatomy"].ids.tolist() == [-1, -1, -1, -1]
    assert len(notes) == 1
    assert "'dog'; 2 images" in notes[0]
    (tmp_path / "l.yaml").write_text("cat: {modality: MR}\ndgo: {modality: CT}\n")
    with pytest.raises(UserError, match="line 2: the data have no class 'dgo'; did you mean 'dog'"):
        apply_class_map(load_class_map(str(tmp_path / "l.yaml")), classes, 4)
    (tmp_path / "l.yaml").write_text('"*": {modality: OP}\n')
    columns, notes = apply_class_map(load_class_map(str(tmp_path / "l.yaml")), None, 4)
    assert columns["modality"].ids.tolist() == [3] * 4
    assert not notes


def test_shipped_labels_are_found_by_name_and_are_valid() -> None:
    names = sorted(file.stem for file in shipped_folder().glob("*.yaml"))
    assert {"breastmnist", "fundus", "mednist"} <= set(names)
    for name in names:
        load_class_map(name)
    with pytest.raises(UserError, match="did you mean 'mednist'"):
        load_class_map("mednits")


def test_shipped_labels_of_an_installed_wheel_lie_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "medpretrain" / "configs" / "labels"
    installed.mkdir(parents=True)
    (installed / "mine.yaml").write_text("cat: {modality: MR}\n")
    monkeypatch.setattr("data_prep.labels.__file__", str(tmp_path / "data_prep" / "labels.py"))
    assert load_class_map("mine").classes == {"cat": {"modality": 1}}
