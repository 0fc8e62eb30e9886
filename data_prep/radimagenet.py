"""RadImageNet as published: three CSV files, and images whose folders say modality, region and class.

Source: Mei et al. 2022, Radiology: Artificial Intelligence 4(5), e210315, and the data as distributed. The files are
`RadiologyAI_{train,val,test}.csv` with the columns `filename,label`; the images are
`radiology_ai/MOD/REGION/CLASS/NAME.png` for CT and MR, `radiology_ai/US/CLASS/NAME.png` for ultrasound. Nothing is read
of the images: one that is listed and not there is found when it is packed. All columns are Arrow or numpy arrays, so
1.35 million rows cost little memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from data_prep.errors import UserError, nearest
from data_prep.labels import UNKNOWN, VOCABULARIES, ClassMap, LabelColumn, load_class_map

SPLITS = ("train", "val", "test")
COLUMNS = ("filename", "label")
TOP = "radiology_ai"
US_TABLE = "radimagenet_us"
REGIONS = ("abd", "af", "brain", "hip", "knee", "lung", "shoulder", "spine")  # anatomies by the same names
NO_PATIENTS = (
    "RadImageNet names no patients: its published split is kept, "
    "and that no patient stands in two splits cannot be shown"
)

_CHUNK = 100_000  # rows at a time, so that what a step builds for them stays small
_LAYOUT = f"'{TOP}/CT or MR/REGION/CLASS/NAME.png' or '{TOP}/US/CLASS/NAME.png'"
_PATTERN = rf"^{TOP}/(?:(?:CT|MR)/[^/]+|US)/[^/]+/[^/]+$"


@dataclass(frozen=True)
class RadImageNet:
    """N images, in the order of the files: train, val, test.

    Attributes:
        names: (N,) large_string, the path relative to the root.
        splits: (N,) int8, places in `SPLITS`.
        labels: `class` is the files' column `label`; `modality` and `anatomy`, of `VOCABULARIES`, are from the
            folders, the anatomy of ultrasound from the table.
        patients: None: the data name none.
        warnings: what the user should be told.
    """

    names: pa.LargeStringArray
    splits: np.ndarray
    labels: dict[str, LabelColumn]
    warnings: tuple[str, ...]
    patients: None = None

    def __len__(self) -> int:
        return len(self.names)


def read_radimagenet(root: Path, table: Path | None = None) -> RadImageNet:
    """Read names, split and labels of RadImageNet.

    Args:
        root: the folder that holds the three CSV files and `radiology_ai`.
        table: a labels file that gives the anatomy of ultrasound classes; None takes the one that comes with us.

    Raises:
        UserError: a file or column is missing, a name does not follow the layout or stands there twice, a region or
            modality is unknown, or the table names a class that the data do not have while one of theirs has no entry.
    """
    tables = [_read(root / f"RadiologyAI_{split}.csv") for split in SPLITS]
    files = _Files(root, tuple(map(len, tables)))
    columns = pa.concat_tables(tables)
    del tables
    if not len(columns):
        raise UserError(f"{root}: there are no images in RadiologyAI_train.csv, _val.csv and _test.csv")
    classes = _column(columns.column("label"))
    name = columns.column("filename").combine_chunks()
    del columns
    folders = _folders(name, files)
    _refuse_twice(name, files)
    known, warnings = _modality_and_anatomy(folders, files, table)
    return RadImageNet(
        name,
        np.repeat(np.arange(len(SPLITS), dtype=np.int8), files.counts),
        {"class": classes, **known},
        (NO_PATIENTS, *warnings),
    )


@dataclass(frozen=True)
class _Files:
    """Says where a row stands: `counts` are the rows of each split's file."""

    root: Path
    counts: tuple[int, ...]

    def place(self, row: int) -> str:
        for split, count in zip(SPLITS, self.counts, strict=True):
            if row < count:
                return f"{self.root / f'RadiologyAI_{split}.csv'}, line {row + 2}"
            row -= count
        raise AssertionError(row)


def _read(path: Path) -> pa.Table:
    """The columns filename and label, the latter as a dictionary.

    Row i stands in line i + 2, for no line may be empty and no field hold a line break.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; RadImageNet comes with RadiologyAI_train.csv, _val.csv and _test.csv")
    bad: list[str] = []

    def refuse(row: pa.csv.InvalidRow) -> str:
        if not bad:
            bad.append(f"{path}, line {row.number}: has {row.actual_columns} fields, the header {row.expected_columns}")
        return "error"

    try:
        content = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False, encoding="utf8"),
            parse_options=pa.csv.ParseOptions(ignore_empty_lines=False, invalid_row_handler=refuse),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.large_string() for name in COLUMNS}, strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if bad:
            raise UserError(bad[0]) from None
        # Arrow's sentence may quote the line, which may hold anything.
        kind = "is empty" if "Empty CSV" in str(error) else "is no readable UTF-8 CSV file"
        raise UserError(f"{path} {kind}") from None
    for name in COLUMNS:
        if name not in content.column_names:
            raise UserError(f"{path}, line 1: has no column {name!r}{nearest(name, content.column_names)}")
        if content.column_names.count(name) > 1:
            raise UserError(f"{path}, line 1: column {name!r} stands there twice")
    for name in COLUMNS:
        column = content.column(name)
        empty = _first(pc.match_substring_regex(column, "^$"))
        if empty is not None:
            raise UserError(f"{path}, line {empty + 2}: the {name} is empty")
        odd = _first(pc.match_substring_regex(column, r"[\x00-\x1f\x7f]"))
        if odd is not None:
            raise UserError(f"{path}, line {odd + 2}: the {name} holds a control character or a line break")
    label = content.column("label").dictionary_encode()  # at once: as text it is as long as the names
    return pa.table({"filename": content.column("filename"), "label": label})


def _first(mask: pa.Array | pa.ChunkedArray) -> int | None:
    """The first row that is true."""
    if not pc.any(mask).as_py():
        return None
    return int(np.asarray(mask).argmax())


def _folders(name: pa.LargeStringArray, files: _Files) -> pa.DictionaryArray:
    """Each image's folder below `radiology_ai`, as a dictionary: `CT/lung/normal` or `US/liver`."""
    odd = _first(pc.invert(pc.match_substring_regex(name, _PATTERN)))
    if odd is None:
        odd = _first(pc.match_substring_regex(name, r"/\.{1,2}(/|$)"))
    if odd is not None:
        raise UserError(_odd_name(name[odd].as_py(), files.place(odd)))
    parts = [
        pc.dictionary_encode(pc.replace_substring_regex(name[start : start + _CHUNK], rf"^{TOP}/(.*)/[^/]+$", r"\1"))
        for start in range(0, len(name), _CHUNK)
    ]
    return pa.chunked_array(parts).unify_dictionaries().combine_chunks()


def _odd_name(name: str, place: str) -> str:
    parts = name.split("/")
    if len(parts) in (4, 5) and parts[0] != TOP:
        return f"{place}: {name!r} does not begin with {TOP!r}"
    if len(parts) in (4, 5) and parts[1] not in ("CT", "MR", "US"):
        return f"{place}: unknown modality folder {parts[1]!r}{nearest(parts[1], ('CT', 'MR', 'US'))}"
    return f"{place}: {name!r} does not follow the layout {_LAYOUT}"


def _refuse_twice(name: pa.LargeStringArray, files: _Files) -> None:
    """Each name once, over all splits: otherwise an image is in two of them."""
    hashes = np.empty(len(name), np.int64)  # a set of the names themselves would take ten times the memory
    for start in range(0, len(name), _CHUNK):
        part = name[start : start + _CHUNK].to_pylist()
        hashes[start : start + len(part)] = [hash(value) for value in part]
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(np.diff(hashes[order]) == 0)
    pairs = [(int(order[i + 1]), int(order[i])) for i in alike if name[order[i]] == name[order[i + 1]]]
    if pairs:
        second, first = min(pairs)
        raise UserError(f"{files.place(second)}: {name[second].as_py()!r} stands there already ({files.place(first)})")


def _modality_and_anatomy(
    folders: pa.DictionaryArray, files: _Files, table: Path | None
) -> tuple[dict[str, LabelColumn], list[str]]:
    """Modality and anatomy of each image, and warnings."""
    keys: list[list[str]] = [key.split("/") for key in folders.dictionary.to_pylist()]
    places = folders.indices.to_numpy()
    chosen = load_class_map(str(table) if table is not None else US_TABLE)
    ultrasound = {key[1]: i for i, key in enumerate(keys) if key[0] == "US"}
    missing = _check_table(chosen, ultrasound, shipped=table is None)
    modality, anatomy = np.full((2, len(keys)), UNKNOWN, np.int32)
    for i, key in enumerate(keys):
        modality[i] = VOCABULARIES["modality"].index(key[0])
        if key[0] == "US":
            anatomy[i] = chosen.classes.get(key[1], {}).get("anatomy", UNKNOWN)
        elif key[1] in REGIONS:
            anatomy[i] = VOCABULARIES["anatomy"].index(key[1])
        else:
            row = int((places == i).argmax())
            raise UserError(f"{files.place(row)}: unknown region folder {key[1]!r}{nearest(key[1], REGIONS)}")
    warnings = []
    if missing:
        images = int(np.isin(places, [ultrasound[name] for name in missing]).sum())
        listed = ", ".join(repr(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.append(
            f"{len(missing)} of {len(ultrasound)} ultrasound classes ({listed}; {images} images) have no anatomy in "
            f"the labels file {chosen.name}: theirs stays unknown"
        )
    source = f"folder; ultrasound by labels file {chosen.origin}"
    columns = {
        "modality": LabelColumn(list(VOCABULARIES["modality"]), modality[places], "folder"),
        "anatomy": LabelColumn(list(VOCABULARIES["anatomy"]), anatomy[places], source),
    }
    return columns, warnings


def _check_table(table: ClassMap, ultrasound: dict[str, int], shipped: bool) -> list[str]:
    """The ultrasound classes without an entry; a slip of the pen in the user's own table raises."""
    for name, entry in table.classes.items():
        if entry.get("modality", VOCABULARIES["modality"].index("US")) != VOCABULARIES["modality"].index("US"):
            raise UserError(f"{table.places[name]}: the class {name!r} is ultrasound: its modality is US")
    missing = sorted(name for name in ultrasound if "anatomy" not in table.classes.get(name, {}))
    extra = [name for name in table.classes if name not in ultrasound]
    if missing and extra and not shipped:
        raise UserError(f"{table.places[extra[0]]}: the data have no class {extra[0]!r}{nearest(extra[0], missing)}")
    return missing


def _column(values: pa.ChunkedArray) -> LabelColumn:
    """A label column with its vocabulary in the order of the text."""
    encoded = values.unify_dictionaries().combine_chunks()
    found: list[str] = encoded.dictionary.to_pylist()
    names = sorted(found)
    number = {name: place for place, name in enumerate(names)}
    table = np.array([number[name] for name in found], np.int32)
    return LabelColumn(names, table[encoded.indices.to_numpy()], "manifest")
