"""`prep dicom`: a PACS export becomes a source of images: headers are scanned once, files are decoded when packed.

The plan holds pseudonyms only. Workers read the key from its file; it travels nowhere.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data_prep.columns import Words
from data_prep.dataset_info import Deidentification
from data_prep.dicom.anatomy import AnatomyTable, load_table, locate, modality_id
from data_prep.dicom.gate import gate
from data_prep.dicom.header import read_whole, silenced, wordless
from data_prep.dicom.pixels import frames
from data_prep.dicom.profile import Profile, load_profile
from data_prep.dicom.pseudonyms import Pseudonyms, load_key
from data_prep.dicom.record import describe
from data_prep.dicom.scan import ScanRejected, identify, scan
from data_prep.dicom.walk import opened, read, walk
from data_prep.dicom.windows import WindowChoice, parse_window
from data_prep.errors import UserError
from data_prep.labels import UNKNOWN, VOCABULARIES, LabelColumn
from data_prep.options import MEASURED
from data_prep.pool import Engine
from data_prep.previous import without_twice
from data_prep.quarantine import Rejected
from data_prep.samples import from_array
from data_prep.sources import REJECTED_SCHEMA, Source
from data_prep.work import Picture, Reader

CHUNK = 256  # files whose headers a worker scans at a time
ANATOMY_SOURCES = ("AnatomicRegionSequence", "BodyPartExamined", "table")
_INSTANCE = "i"


@functools.lru_cache(maxsize=4)
def _pseudonyms(key_file: Path) -> Pseudonyms:
    return Pseudonyms(load_key(key_file))


@dataclass(frozen=True)
class Rules:
    """What decides whether a file may pass, and under which names.

    Attributes:
        root: the export, see `walk`.
        key_file: the key of the pseudonyms; read where it is needed.
        profile: what leaves with an image.
        table: the user's rules on anatomy.
        reviewed: pseudonyms of instances whose pixels a human has approved.
    """

    root: Path
    key_file: Path
    profile: Profile
    table: AnatomyTable | None = None
    reviewed: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class DicomReader:
    """Files of an export as images: windowed to `bits`, shrunk to `resize`, written as PNG or JPEG."""

    rules: Rules
    window: WindowChoice
    bits: Literal[8, 16]
    resize: int | None
    extension: Literal["png", "jpg"]

    def read(self, name: bytes, measure: bool) -> Iterable[Picture]:
        rules = self.rules
        data = read(rules.root, name)
        with silenced(), wordless():
            dataset = read_whole(data)
            identity = identify(dataset, _pseudonyms(rules.key_file))
            try:
                # Once more, and on the whole file: the plan may be days old.
                regions = gate(dataset, rules.profile, identity.instance in rules.reviewed).crop
                modality = modality_id(dataset)
                anatomy = locate(dataset, rules.table, identity.series)
                found = frames(
                    dataset,
                    choice=self.window,
                    bits=self.bits,
                    modality=None if modality == UNKNOWN else VOCABULARIES["modality"][modality],
                    anatomy=anatomy.name,
                    regions=regions,
                )
                pictures = []
                for frame in found:
                    pixels = frame.pixels
                    if pixels.ndim == 3 and self.bits == 16:
                        raise Rejected("unsupported_mode", "colour in a dataset of 16-bit gray images")
                    about = {**describe(dataset, rules.profile, frame.number), "Window": frame.window}
                    if anatomy.source is not None:
                        about["AnatomySource"] = anatomy.source
                    sample = from_array(pixels, self.resize, measure, extension=self.extension)
                    pictures.append(
                        Picture(sample, identity.study, identity.series, identity.instance, frame.number, about)
                    )
            except Rejected as reason:
                reason.instance = identity.instance
                raise
        if len(pictures) == 1:
            return (pictures[0]._replace(frame=None),)
        return pictures


@dataclass(frozen=True)
class Dicom:
    """A PACS export, and how it is to be read.

    Attributes:
        source: a folder, a zip archive, a DICOMDIR or one file.
        key_file: at least 32 random bytes; without it nothing is read.
        profile: a de-identification profile by name or path.
        anatomy: the user's table of anatomies, see `load_table`.
        reviewed: a CSV with a column `instance`: pseudonyms of instances that a human has approved.
        window: see `parse_window`.
        bits: 8, or 16 for gray images alone.
        image_format: png or jpg.
        resize: the largest shorter side in pixels.
    """

    source: Path
    key_file: Path
    profile: str = "strict"
    anatomy: Path | None = None
    reviewed: Path | None = None
    window: str = "stored"
    bits: Literal[8, 16] = 8
    image_format: Literal["png", "jpg"] = "png"
    resize: int | None = None

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize must be at least 1, not {self.resize}")
        if self.bits not in (8, 16):
            raise UserError(f"--bits must be 8 or 16, not {self.bits}")
        if self.image_format not in ("png", "jpg"):
            raise UserError(f"--format must be png or jpg, not {self.image_format!r}")
        if self.bits == 16 and self.image_format == "jpg":
            raise UserError("--format jpg holds 8 bits; 16 need png")

    @functools.cached_property
    def rules(self) -> Rules:
        table = None if self.anatomy is None else load_table(self.anatomy)
        reviewed = frozenset() if self.reviewed is None else load_reviewed(self.reviewed)
        return Rules(self.source, self.key_file.resolve(), load_profile(self.profile), table, reviewed)

    @functools.cached_property
    def choice(self) -> WindowChoice:
        return parse_window(self.window)

    @property
    def root(self) -> Path:
        return self.source if self.source.is_dir() else self.source.parent

    @property
    def measured(self) -> int:
        return MEASURED

    def options(self) -> dict[str, Any]:
        rules = self.rules
        approved = json.dumps(sorted(rules.reviewed)).encode()
        return {
            "source": "dicom",
            "window": self.choice.origin,
            "window_table_sha256": self.choice.digest,
            "bits": self.bits,
            "format": self.image_format,
            "resize": self.resize,
            "anatomy_sha256": None if rules.table is None else rules.table.digest,
            "reviewed_sha256": hashlib.sha256(approved).hexdigest() if rules.reviewed else None,
            "profile_sha256": rules.profile.digest,
        }

    def request(self) -> dict[str, Any]:
        source = self.source.resolve()
        if source in (self.rules.key_file, *self.rules.key_file.parents):
            raise UserError(f"the key file {self.key_file} lies in the export {self.source}; keep it elsewhere")
        return {"path": str(source), "key_id": _pseudonyms(self.rules.key_file).key_id}

    def deidentification(self) -> Deidentification:
        profile = self.rules.profile
        return Deidentification(
            profile=profile.name if Path(self.profile).suffix == "" else "custom",
            profile_sha256=profile.digest,
            claims=profile.claims,
            key_id=_pseudonyms(self.rules.key_file).key_id,
        )

    def open(self, engine: Engine, state: Path, report: Callable[[int, int | None], None]) -> Source:
        return scanned(self.rules, engine, report)

    def reader(self, state: Path) -> Reader:
        return DicomReader(self.rules, self.choice, self.bits, self.resize, self.image_format)


def load_reviewed(path: Path) -> frozenset[str]:
    """The instances that a human has approved.

    Raises:
        UserError: no CSV with a column `instance`, or a value that is no instance's pseudonym; with the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if "instance" not in (rows.fieldnames or ()):
                raise UserError(f"--reviewed {path}: has no column 'instance'")
            found = set()
            for row in rows:
                value = row["instance"] or ""
                if len(value) != 33 or value[0] != _INSTANCE or set(value[1:]) - set("0123456789abcdef"):
                    raise UserError(
                        f"--reviewed {path}, line {rows.line_num}: is no instance's pseudonym ('i' and 32 hexadecimal "
                        "digits, as quarantine.parquet has them)"
                    )
                found.add(value)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--reviewed {path} cannot be read: {type(error).__name__}") from None
    return frozenset(found)


# Scanning

_SCANNED = pa.schema(
    [
        pa.field("number", pa.int64()),
        pa.field("name", pa.large_binary()),
        pa.field("patient", pa.string()),
        pa.field("person", pa.string()),
        pa.field("study", pa.string()),
        pa.field("series", pa.string()),
        pa.field("instance", pa.string()),
        pa.field("frames", pa.int32()),
        pa.field("modality", pa.int32()),
        pa.field("anatomy", pa.int32()),
        pa.field("anatomy_source", pa.int32()),
        pa.field("face_risk", pa.bool_()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)


def scan_chunk(rules: Rules, chunk: tuple[int, list[bytes]]) -> pa.Table:
    """Read the headers of some files: a row of `_SCANNED` each, with a reason where one cannot be used."""
    start, names = chunk
    rows = []
    for number, name in enumerate(names, start):
        row: dict[str, Any] = {"number": number, "name": name}
        try:
            with wordless(), opened(rules.root, name) as file:
                found = scan(file, name, _pseudonyms(rules.key_file), rules.profile, rules.table, rules.reviewed)
        except ScanRejected as reason:
            row |= {**reason.identity._asdict(), "reason": reason.code, "message": reason.message}
        except Rejected as reason:
            row |= {"reason": reason.code, "message": reason.message}
        else:
            source = UNKNOWN if found.anatomy_source is None else ANATOMY_SOURCES.index(found.anatomy_source)
            row |= {
                **found.identity._asdict(),
                "person": found.person,
                "frames": found.frames,
                "modality": found.modality,
                "anatomy": found.anatomy,
                "anatomy_source": source,
                "face_risk": found.face_risk,
            }
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SCANNED)


def scanned(rules: Rules, engine: Engine, report: Callable[[int, int | None], None]) -> Source:
    """Scan an export.

    Raises:
        UserError: no files, a folder that cannot be read, or a key that cannot be used.
    """
    _pseudonyms(rules.key_file)  # a bad key is one message here, not one a worker
    done = 0
    tables: list[pa.Table] = []
    for table in engine.map(functools.partial(scan_chunk, rules), _chunks(walk(rules.root))):
        tables.append(table)
        done += len(table)
        report(done, None)
    if not tables:
        raise UserError(f"{rules.root}: there are no files in it")
    tables.sort(key=lambda table: table.column("number")[0].as_py())
    every = pa.concat_tables(tables)
    tables.clear()
    usable = every.column("reason").is_null()
    rejected = every.filter(every.column("reason").is_valid()).select(REJECTED_SCHEMA.names).cast(REJECTED_SCHEMA)
    table = every.filter(usable).combine_chunks()
    del every

    def words(name: str) -> pa.DictionaryArray:
        return Words().extend(table.column(name).to_pylist()).column()

    def label(name: str, names: Iterable[str], source: str) -> LabelColumn:
        return LabelColumn(list(names), table.column(name).to_numpy(), source)

    header = "DICOM header, see anatomy_source"
    labels = {
        "modality": label("modality", VOCABULARIES["modality"], "DICOM header, Modality"),
        "anatomy": label("anatomy", VOCABULARIES["anatomy"], header),
        "anatomy_source": label("anatomy_source", ANATOMY_SOURCES, header),
    }
    names, instances = (table.column(name).combine_chunks() for name in ("name", "instance"))
    faces = int(np.count_nonzero(table.column("face_risk").to_numpy()))
    source = Source(
        "dicom",
        rules.root if rules.root.is_dir() else rules.root.parent,
        names,
        words("patient"),
        None,
        labels,
        # A file's name may say who the patient is, and a message may be logged.
        lambda i: f"instance {instances[i].as_py()}",
        keyed=True,
        groups=_groups(table.column("person").to_pylist(), table.column("study").to_pylist()),
        frames=table.column("frames").to_numpy(),
        instances=instances,
        numbers=table.column("number").to_numpy(),
        rejected=rejected,
        notes=(_FACES.format(faces),) if faces else (),
    )
    return without_twice(source, _again(source.instances))


_FACES = (
    "{} files are CT, MR or PET of the head, or of an unknown region: a face can be rebuilt from such a series, "
    "and nothing was done about it (option 113102 is not claimed)"
)


def _groups(persons: list[str | None], studies: list[str | None]) -> pa.DictionaryArray:
    """What may not be parted by a split: files of one PatientID, and of one study, and so on from each to the next.

    A group goes by its least person, so that it falls into the same split as when that person stands alone.
    """
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (higher := above.setdefault(name, name)) != name:
            above[name] = name = above[higher]
        return name

    for person, study in zip(persons, studies, strict=True):
        if person is not None and study is not None:
            one, two = top(person), top(study)
            above[max(one, two)] = min(one, two)  # persons begin with p, before s
    either = (study if person is None else person for person, study in zip(persons, studies, strict=True))
    return Words().extend(None if name is None else top(name) for name in either).column()


def _chunks(names: Iterator[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    start = 0
    while chunk := list(islice(names, CHUNK)):
        yield start, chunk
        start += len(chunk)


def _again(instances: pa.Array | None) -> np.ndarray:
    """(N,) bool: the instance stands there already, in a file before."""
    assert instances is not None
    ids = instances.dictionary_encode().indices.fill_null(-1).to_numpy()
    _, first = np.unique(ids, return_index=True)
    again = np.ones(len(ids), bool)
    again[first] = False
    return again & (ids >= 0)
