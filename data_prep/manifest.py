"""A CSV or Parquet table of images: `path`, optional `patient` and `split`, and label columns."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.columns import Words, names_column, values
from data_prep.errors import UserError, nearest
from data_prep.labels import UNKNOWN, VOCABULARIES, LabelColumn, vocabulary_id
from data_prep.sources import Source, shown

SPLIT_NAME = re.compile(r"[a-z0-9_]{1,32}")
LABEL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Row = list[str | None]
Place = Callable[[int], str]


def from_manifest(path: Path, label_columns: Sequence[str] | None) -> Source:
    """Read a manifest; paths in it are relative to its folder.

    Args:
        path: the .csv or .parquet file.
        label_columns: the label columns to keep; None keeps all.

    Raises:
        UserError: with file and line, for whatever cannot be used.
    """
    head, rows, place = (_csv if path.suffix == ".csv" else _parquet)(path)
    if "path" not in head:
        raise UserError(f"{path}: has no column 'path'{nearest('path', head)}")
    kept = [
        name for name in head if name in ("path", "patient", "split") or label_columns is None or name in label_columns
    ]
    for name in set(kept) - {"path", "patient", "split"}:
        if not LABEL_NAME.fullmatch(name):
            raise UserError(f"{path}: column {name!r}: a label's name may have letters, digits, _ and -")
    words = {name: Words() for name in kept if name != "path"}
    at = {name: head.index(name) for name in words}
    path_at = head.index("path")

    def paths() -> Iterator[str]:
        for i, row in enumerate(rows):
            for name, column in words.items():
                column.add(row[at[name]])
            yield _checked(row[path_at], path.parent, i, place)

    names = names_column(paths())
    _refuse_twice(names, place)
    patients = words.pop("patient", None) or Words().extend([None] * len(names))
    splits = words.pop("split", None)
    if splits is not None:
        column = splits.column()
        for word in [*column.dictionary.to_pylist(), *([None] if column.null_count else [])]:
            if word is None or not SPLIT_NAME.fullmatch(word):
                raise UserError(
                    f"{place(_first(column, word))}: the split must be lower-case letters, digits or _, "
                    f"not {word or ''!r}"
                )
    labels = {name: _labels(name, column, place) for name, column in words.items()}
    return Source(
        "files", path.parent, names, patients.column(), None if splits is None else splits.column(), labels, place
    )


def _labels(name: str, words: Words, place: Place) -> LabelColumn:
    if name not in VOCABULARIES:
        return words.labels("manifest")
    column = words.column()
    for word in column.dictionary.to_pylist():
        if word not in VOCABULARIES[name]:
            vocabulary_id(name, word, place(_first(column, word)))
    return words.ids_in(list(VOCABULARIES[name]), "manifest")


def _first(column: pa.DictionaryArray, word: str | None) -> int:
    """The first row that says `word`."""
    ids = column.indices.fill_null(UNKNOWN).to_numpy()
    return int(np.argmax(ids == (UNKNOWN if word is None else column.dictionary.index(word).as_py())))


def _csv(path: Path) -> tuple[list[str], Iterator[Row], Place]:
    lines = array("q")
    file = path.open(encoding="utf-8-sig", newline="")
    reader = csv.reader(file, strict=True)

    def parsed() -> Iterator[list[str]]:
        try:
            yield from reader
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None

    stream = parsed()
    head = [name.strip() for name in next(stream, [])]
    if len(set(head)) != len(head):
        twice = next(name for name in head if head.count(name) > 1)
        raise UserError(f"{path}, line 1: column {twice!r} stands there twice")

    def rows() -> Iterator[Row]:
        with file:
            for row in stream:
                if not row:
                    continue
                if len(row) != len(head):
                    raise UserError(f"{path}, line {reader.line_num}: has {len(row)} fields, the header {len(head)}")
                lines.append(reader.line_num)
                yield [value.strip() or None for value in row]

    return head, rows(), lambda i: f"{path}, line {lines[i]}"


def _parquet(path: Path) -> tuple[list[str], Iterator[Row], Place]:
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file: {error}") from None
    for field in table.schema_arrow:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        simple = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if not (simple or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column {field.name!r} is {field.type}; it must be text, whole numbers or boolean")

    def rows() -> Iterator[Row]:
        try:
            for batch in table.iter_batches(batch_size=1 << 13):
                columns = [column.to_pylist() for column in batch.columns]
                for row in zip(*columns, strict=True):
                    yield [None if value is None else str(value).strip() or None for value in row]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is no readable Parquet file: {error}") from None

    return list(table.schema_arrow.names), rows(), lambda i: f"{path}, row {i + 1}"


def _checked(name: str | None, root: Path, i: int, place: Place) -> str:
    """A path that is given, relative and there."""
    if not name:
        raise UserError(f"{place(i)}: the path is empty")
    if name.startswith("/"):
        raise UserError(f"{place(i)}: the path {name!r} must be relative to the manifest's folder")
    if not os.path.isfile(f"{root}/{name}"):
        raise UserError(f"{place(i)}: there is no file {name!r} (paths are relative to {root})")
    return name


def _refuse_twice(names: pa.Array, place: Place) -> None:
    """A file may stand in a manifest once, however its path is written."""
    digests = bytearray()
    for name in values(names):
        digests += hashlib.blake2b(os.path.normpath(name), digest_size=16).digest()
    low, high = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    order = np.lexsort((high, low))
    low, high = low[order], high[order]
    same = np.flatnonzero((low[1:] == low[:-1]) & (high[1:] == high[:-1]))
    if len(same):
        pairs = [(int(order[row + 1]), int(order[row])) for row in same]
        again, first = min(pairs)
        raise UserError(f"{place(again)}: {shown(names[again].as_py())!r} stands there already ({place(first)})")
