"""Where images come from: a folder tree, a CSV or Parquet manifest, or a MedMNIST-style .npz, all read into one shape.

Only names and labels are read here, no pixels.
"""

from __future__ import annotations

import csv
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError, nearest
from data_prep.labels import UNKNOWN, VOCABULARIES, LabelColumn, vocabulary_id

SPLITS = ("train", "val", "test")
SPLIT_NAME = re.compile(r"[a-z0-9_]{1,32}")
LABEL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Source:
    """N images by name, with what is known of them.

    Attributes:
        kind: how the pixels are read: `files` under `root`, or arrays of the .npz file `root`.
        root: the folder that `names` are relative to, or the .npz file.
        names: the path of each image, or `SPLIT/NUMBER` in an .npz file; each once.
        patients: the patient's id as the source says it, None where unknown.
        splits: the split the source brings, or None where it brings none.
        labels: label columns by name.
        place: says where image i stands, for an error message.
    """

    kind: Literal["files", "npz"]
    root: Path
    names: list[str]
    patients: Sequence[str | None]
    splits: list[str] | None
    labels: dict[str, LabelColumn]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.names)


def open_source(path: Path, label_columns: Sequence[str] | None = None) -> Source:
    """Read names, labels, patients and splits of a folder, a manifest or an .npz file.

    Args:
        path: the folder or file.
        label_columns: the label columns to keep; None keeps all, an empty list none.

    Raises:
        UserError: nothing there, no images, or something in it that cannot be used, with file and line.
    """
    if path.is_dir():
        source = _from_folder(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist")
    elif path.suffix == ".npz":
        source = _from_npz(path)
    elif path.suffix in (".csv", ".parquet"):
        source = _from_manifest(path, label_columns)
    else:
        raise UserError(f"{path}: a source is a folder, a .csv or .parquet manifest, or an .npz file")
    if not source.names:
        raise UserError(f"{path}: there are no images in it")
    if label_columns is not None:
        for name in label_columns:
            if name not in source.labels:
                raise UserError(f"--label-column: {path} has no label column {name!r}{nearest(name, source.labels)}")
        source = replace(source, labels={name: source.labels[name] for name in label_columns})
    for name, column in source.labels.items():
        for value in column.names:
            if not value.isprintable():
                raise UserError(f"{path}: label {name!r}: the value {value!r} is not printable UTF-8 text")
        _refuse_identifiers(name, column, path)
    return _refuse_patient_labels(source)


def with_patient_pattern(source: Source, pattern: str) -> Source:
    r"""Take each image's patient from its name: group 1 of a regular expression found anywhere in it.

    Raises:
        UserError: a bad expression, one without a group, an image it does not match, or patients already known.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--patient-pattern {pattern!r}: {error}") from None
    if expression.groups < 1:
        raise UserError(f"--patient-pattern {pattern!r}: needs a group, as in '(\\d+)_(?:left|right)'")
    if any(patient is not None for patient in source.patients):
        raise UserError("--patient-pattern: the source has a column 'patient' already; give one or the other")
    patients: list[str | None] = []
    for name in source.names:
        match = expression.search(name)
        if match is None or not match[1]:
            raise UserError(f"--patient-pattern {pattern!r} finds no patient in {name!r}")
        patients.append(match[1])
    return _refuse_patient_labels(replace(source, patients=patients))


def _refuse_patient_labels(source: Source) -> Source:
    """Label values stand readable in the dataset, so none may be its patient's id."""
    known = set(source.patients)
    for label, column in source.labels.items():
        if known.isdisjoint(column.names):
            continue
        # Grade 2 and patient 2 may both exist; a label that mostly says the image's own patient is an id.
        named = [(column.names[place], i) for i, place in enumerate(column.ids.tolist()) if place != UNKNOWN]
        if 2 * sum(value == source.patients[i] for value, i in named) > len(named):
            raise UserError(
                f"the label {label!r}, which the dataset would show, says the patient's id; "
                "leave it out (--no-labels, or --label-column for the others)"
            )
    return source


def _refuse_identifiers(name: str, column: LabelColumn, path: Path) -> None:
    """A label with hardly two images alike is a name, a number or a date, and would leave the hospital in clear."""
    if len(column.ids) >= 20 and len(column.names) > len(column.ids) / 2:
        raise UserError(
            f"{path}: label {name!r} has {len(column.names)} values for {len(column.ids)} images, so it looks like an "
            "identifier; choose the labels to keep with --label-column, or --no-labels"
        )


def vocabulary_order(values: set[str]) -> list[str]:
    """Class names in order: as numbers where all are whole numbers, else as text."""
    if all(re.fullmatch(r"-?[0-9]{1,18}", value) for value in values):
        return sorted(values, key=lambda value: (int(value), value))
    return sorted(values)


def label_column(values: Sequence[str | None], source: str) -> LabelColumn:
    """A label column with its own vocabulary; None is unknown."""
    names = vocabulary_order({value for value in values if value is not None})
    number = {name: place for place, name in enumerate(names)}
    ids = np.fromiter((UNKNOWN if value is None else number[value] for value in values), np.int32, len(values))
    return LabelColumn(names, ids, source)


# Folder tree


def _from_folder(root: Path) -> Source:
    names = sorted(_walk(root, "", ()))
    top = {name.split("/", 1)[0] for name in names if "/" in name}
    splits: list[str] | None = None
    depth = 0
    if "train" in top:
        odd = sorted(top - set(SPLITS))
        loose = next((name for name in names if "/" not in name), None)
        if odd or loose:
            what = f"folder {odd[0]!r}{nearest(odd[0], SPLITS)}" if odd else f"file {loose!r}"
            raise UserError(f"{root}: beside the split folder 'train' stands the {what}")
        splits = [name.split("/", 1)[0] for name in names]
        depth = 1
    classes = [parts[depth] if len(parts := name.split("/")) > depth + 1 else None for name in names]
    labels = {"class": label_column(classes, "folder")} if any(value is not None for value in classes) else {}
    return Source("files", root, names, [None] * len(names), splits, labels, lambda i: f"{root / names[i]}")


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths of all files but hidden ones; links to folders are followed, but not in circles."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError(f"{folder}: a link leads back to a folder above it")
    try:
        scan = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    with scan as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_file() or entry.is_symlink():  # a link to nowhere is quarantined as unreadable
                yield prefix + entry.name
            else:
                raise UserError(f"{folder / entry.name} is neither a file nor a folder")


# Manifest


def _from_manifest(path: Path, label_columns: Sequence[str] | None) -> Source:
    columns, place = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    if "path" not in columns:
        raise UserError(f"{path}: has no column 'path'{nearest('path', columns)}")
    names = _checked_paths(columns.pop("path"), path.parent, place)
    patients = columns.pop("patient", [None] * len(names))
    splits = columns.pop("split", None)
    if splits is not None:
        for i, split in enumerate(splits):
            if split is None or not SPLIT_NAME.fullmatch(split):
                raise UserError(f"{place(i)}: the split must be lower-case letters, digits or _, not {split or ''!r}")
    labels: dict[str, LabelColumn] = {}
    for name, values in columns.items():
        if label_columns is not None and name not in label_columns:
            continue
        if not LABEL_NAME.fullmatch(name):
            raise UserError(f"{path}: column {name!r}: a label's name may have letters, digits, _ and -")
        column = label_column(values, "manifest")
        if name in VOCABULARIES:
            for value in column.names:
                if value not in VOCABULARIES[name]:
                    vocabulary_id(name, value, place(values.index(value)))
            table = np.array([VOCABULARIES[name].index(value) for value in column.names] + [UNKNOWN], np.int32)
            column = LabelColumn(list(VOCABULARIES[name]), table[column.ids], "manifest")
        labels[name] = column
    return Source(
        "files", path.parent, names, patients, [str(split) for split in splits] if splits else None, labels, place
    )


Columns = dict[str, list[str | None]]


def _read_csv(path: Path) -> tuple[Columns, Callable[[int], str]]:
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            for row in reader:
                if not row:
                    continue
                if len(row) != len(head):
                    raise UserError(f"{path}, line {reader.line_num}: has {len(row)} fields, the header {len(head)}")
                rows.append(row)
                lines.append(reader.line_num)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    head = [name.strip() for name in head]
    if len(set(head)) != len(head):
        twice = next(name for name in head if head.count(name) > 1)
        raise UserError(f"{path}, line 1: column {twice!r} stands there twice")
    columns: Columns = {name: [row[i].strip() or None for row in rows] for i, name in enumerate(head)}
    return columns, lambda i: f"{path}, line {lines[i]}"


def _read_parquet(path: Path) -> tuple[Columns, Callable[[int], str]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file: {error}") from None
    columns: Columns = {}
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        simple = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if not (simple or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column {field.name!r} is {field.type}; it must be text, whole numbers or boolean")
        values = table.column(field.name).to_pylist()
        columns[field.name] = [None if value is None else str(value).strip() or None for value in values]
    return columns, lambda i: f"{path}, row {i + 1}"


def _checked_paths(paths: list[str | None], root: Path, place: Callable[[int], str]) -> list[str]:
    """The paths, each given, relative, there, and there once."""
    first: dict[str, int] = {}
    for i, name in enumerate(paths):
        if not name:
            raise UserError(f"{place(i)}: the path is empty")
        if name.startswith("/"):
            raise UserError(f"{place(i)}: the path {name!r} must be relative to the manifest's folder")
        if first.setdefault(os.path.normpath(name), i) != i:
            raise UserError(f"{place(i)}: {name!r} stands there already ({place(first[os.path.normpath(name)])})")
        if not (root / name).is_file():
            raise UserError(f"{place(i)}: there is no file {name!r} (paths are relative to {root})")
    return [str(name) for name in paths]


# MedMNIST


def _from_npz(path: Path) -> Source:
    names: list[str] = []
    splits: list[str] = []
    labels: list[np.ndarray] = []
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
            for split in SPLITS:
                if f"{split}_images" not in found:
                    continue
                shape = npz_shape(archive, split, path)
                names += [f"{split}/{number:09d}" for number in range(shape[0])]
                splits += [split] * shape[0]
                if f"{split}_labels" in found:
                    labels.append(_npz_labels(path, split, shape[0]))
            if not names:
                raise UserError(f"{path}: has no array 'train_images'{nearest('train_images', found)}")
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is no readable .npz file: {error}") from None
    columns: dict[str, LabelColumn] = {}
    if labels:
        if len({array.shape[1] for array in labels}) > 1 or sum(map(len, labels)) != len(names):
            raise UserError(f"{path}: the splits do not have the same labels")
        values = np.concatenate(labels)
        if values.shape[1] == 1:
            columns["class"] = label_column([str(value) for value in values[:, 0].tolist()], "npz")
        else:
            if not np.isin(values, (0, 1)).all():
                raise UserError(f"{path}: labels in {values.shape[1]} columns must be 0 or 1")
            for place in range(values.shape[1]):
                ids = values[:, place].astype(np.int32)
                columns[f"class_{place:02d}"] = LabelColumn(["0", "1"], ids, "npz")
    return Source("npz", path, names, [None] * len(names), splits, columns, lambda i: f"{path}, {names[i]}")


def npz_shape(archive: zipfile.ZipFile, split: str, path: Path) -> tuple[int, ...]:
    """The shape of a split's images, read from the array's header alone.

    Raises:
        UserError: the array is not images: (N, H, W) or (N, H, W, 1 or 3) of uint8, or (N, H, W) of uint16.
    """
    with archive.open(f"{split}_images.npy") as file:
        try:
            version = np.lib.format.read_magic(file)
            read: Any = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise UserError(f"{path}: {split}_images: {error}") from None
    gray = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    colour = len(shape) == 4 and shape[3] == 3
    if fortran or not ((gray and dtype in (np.uint8, np.uint16)) or (colour and dtype == np.uint8)) or 0 in shape[1:]:
        raise UserError(
            f"{path}: {split}_images is {dtype} {shape}; it must be uint8 (N, H, W) or (N, H, W, 3), "
            "or uint16 (N, H, W)"
        )
    return tuple(shape)


def _npz_labels(path: Path, split: str, count: int) -> np.ndarray:
    """(count, k) whole numbers."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays[f"{split}_labels"]
    except ValueError as error:
        raise UserError(f"{path}: {split}_labels: {error}") from None
    if labels.ndim == 1:
        labels = labels[:, None]
    if labels.ndim != 2 or len(labels) != count or not np.issubdtype(labels.dtype, np.integer) or not labels.shape[1]:
        raise UserError(
            f"{path}: {split}_labels is {labels.dtype} {labels.shape}; it must be whole numbers, ({count}, k)"
        )
    return np.asarray(labels)
