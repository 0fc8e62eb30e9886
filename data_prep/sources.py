"""Where images come from: a folder tree, a CSV or Parquet manifest, or a MedMNIST-style .npz, all read into one shape.

Only names and labels are read here, no pixels. Columns are Arrow or numpy arrays: a million images are some 100 MB.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import Words, names_column, values
from data_prep.dataset import QUARANTINE_SCHEMA
from data_prep.errors import UserError, nearest
from data_prep.labels import UNKNOWN, LabelColumn

SPLITS = ("train", "val", "test")
# The name goes into the private link table and no further.
REJECTED_SCHEMA = QUARANTINE_SCHEMA.append(pa.field("name", pa.large_binary(), nullable=False))


@dataclass(frozen=True)
class Source:
    """N images (or files of several frames) by name, with what is known of them.

    Attributes:
        kind: what dataset.json calls it.
        root: the folder that `names` are relative to, or the file they are in.
        names: (N,) large_binary: what the reader takes; each once.
        patients: (N,) dictionary of text, the patient's id as the source says it or a pseudonym, null where unknown.
        keyed: `patients` are pseudonyms made with a key.
        splits: (N,) dictionary of text, or None where the source brings no split.
        labels: label columns by name.
        place: says where image i stands, for an error message.
        groups: (N,) dictionary: what stays in one split, such as a patient with all studies; the patient where null.
        frames: (N,) int32 images in each file, None for one.
        instances: (N,) text: DICOM's instance as a pseudonym, or None.
        numbers: (N,) int64: each image's number among all that were found, None where none was set aside.
        rejected: what was set aside before the plan, with REJECTED_SCHEMA.
        notes: warnings for the user.
    """

    kind: str
    root: Path
    names: pa.Array
    patients: pa.DictionaryArray
    splits: pa.DictionaryArray | None
    labels: dict[str, LabelColumn]
    place: Callable[[int], str]
    keyed: bool = False
    groups: pa.DictionaryArray | None = None
    frames: np.ndarray | None = None
    instances: pa.Array | None = None
    numbers: np.ndarray | None = None
    rejected: pa.Table = field(default_factory=REJECTED_SCHEMA.empty_table)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def found(self) -> int:
        """How many sources there were, those set aside included."""
        return len(self.names) + len(self.rejected)

    def taken(self, rows: np.ndarray) -> Source:
        """Some of the sources, in that order."""
        place, numbers = self.place, np.arange(len(self)) if self.numbers is None else self.numbers
        return replace(
            self,
            names=self.names.take(rows),
            patients=self.patients.take(rows),
            splits=None if self.splits is None else self.splits.take(rows),
            labels={name: replace(column, ids=column.ids[rows]) for name, column in self.labels.items()},
            place=lambda i: place(int(rows[i])),
            groups=None if self.groups is None else self.groups.take(rows),
            frames=None if self.frames is None else self.frames[rows],
            instances=None if self.instances is None else self.instances.take(rows),
            numbers=numbers[rows],
        )


def no_patients(count: int) -> pa.DictionaryArray:
    """The column of patients of a source that knows none."""
    return pa.DictionaryArray.from_arrays(pa.nulls(count, pa.int32()), pa.array([], pa.string()))


def keep_labels(source: Source, label_columns: Sequence[str] | None, path: Path) -> Source:
    """Keep some label columns (None: all), and refuse those that would show an identifier.

    Raises:
        UserError: no such column, a value that cannot be printed, or a label that looks like an identifier.
    """
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
    if source.patients.null_count < len(source):
        raise UserError("--patient-pattern: the source has a column 'patient' already; give one or the other")
    patients = Words()
    for raw in values(source.names):
        name = os.fsdecode(raw)
        match = expression.search(name)
        if match is None or not match[1]:
            raise UserError(f"--patient-pattern {pattern!r} finds no patient in {name!r}")
        patients.add(match[1])
    return _refuse_patient_labels(replace(source, patients=patients.column()))


def with_pseudonyms(source: Source, pseudonym: Callable[[str], str | None]) -> Source:
    """Replace the patients' ids by pseudonyms."""
    words = pa.array([pseudonym(word) for word in source.patients.dictionary.to_pylist()], pa.string())
    return replace(source, patients=pa.DictionaryArray.from_arrays(source.patients.indices, words), keyed=True)


def _refuse_patient_labels(source: Source) -> Source:
    """Label values stand readable in the dataset, so none may be its patient's id."""
    place = {patient: number for number, patient in enumerate(source.patients.dictionary.to_pylist())}
    patients = source.patients.indices.fill_null(-1).to_numpy()
    for label, column in source.labels.items():
        same = np.array([place.get(name, -2) for name in column.names] + [-2], np.int64)
        # Grade 2 and patient 2 may both exist; a label that mostly says the image's own patient is an id.
        if 2 * int((same[column.ids] == patients).sum()) > int((column.ids != UNKNOWN).sum()):
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


# Folder tree


def from_folder(root: Path) -> Source:
    """A folder: its sub-folders are the classes, below train/, val/ and test/ where there is a train/.

    Raises:
        UserError: a folder that cannot be read, one that leads back to itself, or a stranger beside the splits.
    """
    names = names_column(walk(root))
    names = names.take(pc.array_sort_indices(names))
    top: dict[str, None] = {}
    loose = None
    for raw in values(names):
        first, slash, _ = raw.partition(b"/")
        if slash:
            top[os.fsdecode(first)] = None
        elif loose is None:
            loose = os.fsdecode(raw)
    splits: pa.DictionaryArray | None = None
    depth = 0
    if "train" in top:
        odd = sorted(set(top) - set(SPLITS))
        if odd or loose:
            what = f"folder {odd[0]!r}{nearest(odd[0], SPLITS)}" if odd else f"file {loose!r}"
            raise UserError(f"{root}: beside the split folder 'train' stands the {what}")
        splits = Words().extend(raw.partition(b"/")[0].decode() for raw in values(names)).column()
        depth = 1
    classes = Words()
    for raw in values(names):
        parts = raw.split(b"/", depth + 1)
        classes.add(os.fsdecode(parts[depth]) if len(parts) > depth + 1 else None)
    labels = {"class": classes.labels("folder")} if classes.any else {}
    return Source(
        "files", root, names, no_patients(len(names)), splits, labels, lambda i: f"{root}/{shown(names[i].as_py())}"
    )


def shown(name: bytes) -> str:
    """A file name as text that can be printed and stored."""
    return name.decode("utf-8", "backslashreplace")


def walk(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Relative paths of all files but hidden ones; links to folders are followed, but not in circles.

    Raises:
        UserError: a folder that cannot be read, a circle of links, or something that is neither file nor folder.
    """
    try:
        status = folder.stat()
        scan = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError(f"{folder}: a link leads back to a folder above it")
    with scan as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_file() or entry.is_symlink():  # a link to nowhere is quarantined as unreadable
                yield prefix + entry.name
            else:
                raise UserError(f"{folder / entry.name} is neither a file nor a folder")


# MedMNIST


def from_npz(path: Path) -> Source:
    """Arrays `{train,val,test}_{images,labels}` of an .npz file.

    Raises:
        UserError: no such file, or arrays that are not images or labels.
    """
    counts: dict[str, int] = {}
    labels: list[np.ndarray] = []
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
            for split in SPLITS:
                if f"{split}_images" not in found:
                    continue
                counts[split] = npz_shape(archive, split, path)[0]
                if f"{split}_labels" in found:
                    labels.append(_npz_labels(path, split, counts[split]))
            if not counts:
                raise UserError(f"{path}: has no array 'train_images'{nearest('train_images', found)}")
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is no readable .npz file: {error}") from None
    names = names_column(f"{split}/{number:09d}" for split, count in counts.items() for number in range(count))
    columns: dict[str, LabelColumn] = {}
    if labels:
        if len({array.shape[1] for array in labels}) > 1 or sum(map(len, labels)) != len(names):
            raise UserError(f"{path}: the splits do not have the same labels")
        every = np.concatenate(labels)
        if every.shape[1] == 1:
            columns["class"] = Words().extend(str(value) for value in every[:, 0].tolist()).labels("npz")
        else:
            if not np.isin(every, (0, 1)).all():
                raise UserError(f"{path}: labels in {every.shape[1]} columns must be 0 or 1")
            for place in range(every.shape[1]):
                columns[f"class_{place:02d}"] = LabelColumn(["0", "1"], every[:, place].astype(np.int32), "npz")
    splits = Words().extend(_repeated(counts)).column()
    return Source(
        "npz", path, names, no_patients(len(names)), splits, columns, lambda i: f"{path}, {names[i].as_py().decode()}"
    )


def _repeated(counts: Mapping[str, int]) -> Iterable[str]:
    for word, count in counts.items():
        for _ in range(count):
            yield word


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
