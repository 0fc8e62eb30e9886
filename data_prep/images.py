"""`prep images`: pictures in a folder, a manifest or an .npz file."""

from __future__ import annotations

import functools
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset_info import Deidentification
from data_prep.dicom.pseudonyms import Pseudonyms, load_key
from data_prep.errors import UserError
from data_prep.labels import ClassMap, apply_class_map, load_class_map
from data_prep.manifest import from_manifest
from data_prep.options import MEASURED, MEASURED_TRUSTED, Options, Progress, Running
from data_prep.pool import Engine
from data_prep.prepare import Summary
from data_prep.prepare import prepare as prepare_kind
from data_prep.quarantine import Rejected
from data_prep.samples import from_array, from_bytes
from data_prep.sources import Source, from_folder, from_npz, keep_labels, with_patient_pattern, with_pseudonyms
from data_prep.work import Picture, Reader

MAX_FILE = 1 << 31
_ARRAYS = "arrays"


@dataclass(frozen=True)
class FileReader:
    """Image files below `root`."""

    root: Path
    resize: int | None
    trust: bool

    def read(self, name: bytes, measure: bool) -> Iterable[Picture]:
        return (Picture(from_bytes(read_file(self.root, name), self.resize, decode=not self.trust, measure=measure)),)


@dataclass(frozen=True)
class ArrayReader:
    """Arrays `{split}_images.npy` in `folder`; a name is `SPLIT/NUMBER`."""

    folder: Path
    resize: int | None

    def read(self, name: bytes, measure: bool) -> Iterable[Picture]:
        split, _, number = name.decode().partition("/")
        array = _array(self.folder / f"{split}_images.npy")
        return (Picture(from_array(np.asarray(array[int(number)]), self.resize, measure)),)


def read_file(root: Path, name: bytes) -> bytes:
    """A whole file.

    Raises:
        Rejected: it cannot be read, or is larger than 2 GiB.
    """
    try:
        with open(os.path.join(os.fsencode(root), name), "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE:
                raise Rejected("too_large", "a file of more than 2 GiB")
            return file.read()
    except OSError as error:
        raise Rejected("unreadable", os.strerror(error.errno or 0)) from None


@functools.lru_cache(maxsize=8)
def _array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True)
class Images:
    """A folder, a manifest or an .npz file, and how it is to be read.

    Attributes:
        source: a folder tree, a .csv or .parquet manifest, or a MedMNIST-style .npz.
        labels: a labels file (path or shipped name) that gives modality and anatomy by class.
        label_columns: the label columns to keep; None keeps all, an empty list none.
        patient_pattern: see `with_patient_pattern`.
        resize: the largest shorter side in pixels; larger images shrink to it.
        trust_images: do not decode images that pass through.
        key_file: pseudonyms of patients are made with this key.
    """

    source: Path
    labels: str | None = None
    label_columns: Sequence[str] | None = None
    patient_pattern: str | None = None
    resize: int | None = None
    trust_images: bool = False
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize must be at least 1, not {self.resize}")

    @functools.cached_property
    def class_map(self) -> ClassMap | None:
        return None if self.labels is None else load_class_map(self.labels)

    @property
    def root(self) -> Path:
        return self.source.parent if self.source.suffix in (".csv", ".parquet") else self.source

    @property
    def measured(self) -> int:
        return MEASURED_TRUSTED if self.trust_images else MEASURED

    def options(self) -> dict[str, Any]:
        return {
            "source": "npz" if self.source.suffix == ".npz" else "files",
            "labels_sha256": None if self.class_map is None else self.class_map.digest,
            "resize": self.resize,
            "trust_images": self.trust_images,
            "key_id": None if self.key_file is None else self._pseudonyms(self.key_file).key_id,
        }

    @staticmethod
    def _pseudonyms(key_file: Path) -> Pseudonyms:
        return Pseudonyms(load_key(key_file))

    def request(self) -> dict[str, Any]:
        return {
            "path": str(self.source.resolve()),
            "label_columns": None if self.label_columns is None else list(self.label_columns),
            "patient_pattern": self.patient_pattern,
        }

    def deidentification(self) -> Deidentification | None:
        return None

    def open(self, engine: Engine, state: Path, report: Callable[[int, int | None], None]) -> Source:
        source = open_source(self.source, self.label_columns)
        if self.patient_pattern is not None:
            source = with_patient_pattern(source, self.patient_pattern)
        source = with_class_map(source, self.class_map)
        if self.key_file is not None:
            source = with_pseudonyms(source, self._pseudonyms(self.key_file).patient)
        if source.kind == "npz":
            _unpack(self.source, source, state / _ARRAYS)
        return source

    def reader(self, state: Path) -> Reader:
        if self.source.suffix == ".npz":
            return ArrayReader(state / _ARRAYS, self.resize)
        return FileReader(self.root.absolute(), self.resize, self.trust_images)


def prepare(
    source: Path,
    out: str | Path,
    *,
    labels: str | None = None,
    label_columns: Sequence[str] | None = None,
    patient_pattern: str | None = None,
    resize: int | None = None,
    trust_images: bool = False,
    key_file: Path | None = None,
    split: Mapping[str, float] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **more: Any,
) -> Summary:
    """Turn a folder, a manifest or an .npz file into a dataset; arguments as in `Images`, `Options` and `Running`.

    Raises:
        UserError, WorkFailed: as `data_prep.prepare.prepare`.
    """
    running = {name: more.pop(name) for name in list(more) if name in Running.__dataclass_fields__}
    kind = Images(source, labels, label_columns, patient_pattern, resize, trust_images, key_file)
    summary = prepare_kind(kind, out, Options(split=split, **more), Running(on_progress=on_progress, **running))
    assert isinstance(summary, Summary), "a part is run by data_prep.prepare.prepare"
    return summary


def open_source(path: Path, label_columns: Sequence[str] | None = None) -> Source:
    """Read names, labels, patients and splits of a folder, a manifest or an .npz file.

    Args:
        path: the folder or file.
        label_columns: the label columns to keep; None keeps all, an empty list none.

    Raises:
        UserError: nothing there, no images, or something in it that cannot be used, with file and line.
    """
    if path.is_dir():
        source = from_folder(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist")
    elif path.suffix == ".npz":
        source = from_npz(path)
    elif path.suffix in (".csv", ".parquet"):
        source = from_manifest(path, label_columns)
    else:
        raise UserError(f"{path}: a source is a folder, a .csv or .parquet manifest, or an .npz file")
    if not len(source):
        raise UserError(f"{path}: there are no images in it")
    return keep_labels(source, label_columns, path)


def with_class_map(source: Source, class_map: ClassMap | None) -> Source:
    """The source with modality and anatomy from its classes.

    Raises:
        UserError: it has such a column already, or the map does not fit its classes.
    """
    if class_map is None:
        return source
    columns, notes = apply_class_map(class_map, source.labels.get("class"), len(source))
    both = sorted(set(columns) & set(source.labels))
    if both:
        raise UserError(f"--labels: the source has a column {both[0]!r} already; give one or the other")
    return replace(source, labels={**source.labels, **columns}, notes=(*source.notes, *notes))


def _unpack(path: Path, source: Source, folder: Path) -> None:
    """The image arrays of an .npz file as plain .npy files that every worker can map, whatever their size."""
    folder.mkdir()
    assert source.splits is not None
    with zipfile.ZipFile(path) as archive:
        for split in source.splits.dictionary.to_pylist():
            name = f"{split}_images.npy"
            try:
                with archive.open(name) as packed, (folder / name).open("xb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path}: {split}_images is damaged: {error}") from None
