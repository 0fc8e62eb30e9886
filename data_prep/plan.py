"""Which image goes into which shard of which split, fixed before any pixel is read, and kept in a file.

Every choice is a hash of the seed and a name, so the plan does not depend on workers, machine or the order of files on
disk. Images are shuffled within a split; a patient is never in two splits. The file holds one row group a shard, so a
job is read by itself and the plan of a whole hospital need not stay in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data_prep.columns import values
from data_prep.dataset import LABEL_PREFIX, to_disk
from data_prep.dataset_info import DatasetInfo, Vocabulary
from data_prep.errors import UserError
from data_prep.manifest import SPLIT_NAME
from data_prep.sources import Source, shown
from data_prep.work import Job

PLAN, PLAN_ROWS, PLAN_REJECTED = "plan.json", "plan.parquet", "rejected.parquet"
MEASURED_SPLIT = "train"  # whose mean and standard deviation the dataset states


@dataclass(frozen=True)
class Base:
    """What a dataset that is added to has already: first free position, source number and shard of each split."""

    position: int = 0
    number: int = 0
    shards: Mapping[str, int] | None = None
    patients: Mapping[str, str] | None = None

    @classmethod
    def of(cls, info: DatasetInfo, keys: Iterable[str], patients: Mapping[str, str], number: int) -> Base:
        """From a dataset, the keys of its last samples, the split of each patient, and the first free number."""
        shards: dict[str, int] = {}
        for shard in info.shards:
            split, _, count = shard.name.removesuffix(".tar").rpartition("-")
            shards[split] = max(shards.get(split, 0), int(count) + 1)
        return cls(max((int(key[:9]) for key in keys), default=-1) + 1, number, shards, patients)


class _Planned(BaseModel):
    model_config = ConfigDict(frozen=True)

    split: str
    shard: str
    start: int
    sources: int
    images: int


class PlanFile(BaseModel):
    """The content of plan.json.

    Attributes:
        request: the command and all its options; a run goes on only with the same.
        base: the SHA-256 of the dataset.json that is appended to.
        found: sources in all, those set aside included.
        labels: the vocabularies.
        jobs: the shards to write, in order.
    """

    model_config = ConfigDict(frozen=True)

    request: dict[str, Any]
    base: str | None
    found: int
    labels: dict[str, Vocabulary]
    jobs: list[_Planned]
    notes: list[str]
    rows_sha256: str

    def job(self, folder: Path, number: int, measure: int) -> Job:
        """One shard's work, read from plan.parquet in `folder`; `measure`: how many train images to measure in all."""
        planned = self.jobs[number]
        shards = sum(job.split == MEASURED_SPLIT for job in self.jobs)
        table = pq.ParquetFile(folder / PLAN_ROWS).read_row_group(number)
        return Job(
            number=number,
            shard=planned.shard,
            split=planned.split,
            start=planned.start,
            names=table.column("name").to_pylist(),
            labels=np.stack([table.column(LABEL_PREFIX + name).to_numpy() for name in self.labels], axis=1)
            if self.labels
            else np.zeros((len(table), 0), np.int32),
            patients=table.column("pseudonym").to_pylist(),
            measure=-(-measure // shards) if planned.split == MEASURED_SPLIT else 0,
        )


def parse_split(text: str | None) -> dict[str, float] | None:
    """Read `train=0.8,val=0.1,test=0.1`; None stays None.

    Raises:
        UserError: not of that form, or the parts do not add up to 1.

    >>> parse_split("train=0.9,val=0.1")
    {'train': 0.9, 'val': 0.1}
    """
    if text is None:
        return None
    parts: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            fraction = float(value)
        except ValueError:
            raise UserError(f"--split {text!r}: {part!r} is not of the form NAME=FRACTION") from None
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(f"--split {text!r}: the name {name!r} must be lower-case letters, digits or _")
        if name in parts or not 0 < fraction <= 1:
            raise UserError(f"--split {text!r}: {part!r} stands there twice or is not above 0 and up to 1")
        parts[name] = fraction
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise UserError(f"--split {text!r}: the parts add up to {sum(parts.values()):g}, not 1")
    return parts


def write_plan(
    folder: Path,
    source: Source,
    request: Mapping[str, Any],
    split: Mapping[str, float] | None,
    seed: int,
    shard_size: int,
    base: Base,
    base_sha256: str | None,
) -> PlanFile:
    """Split, shuffle, name the patients, cut into shards, and write it all down; plan.json comes last.

    Args:
        folder: where plan.parquet, rejected.parquet and plan.json go.
        source: the images.
        request: for `PlanFile`.
        split: fractions by name; a patient (or a study, or an image without one) falls by its hash, so it keeps its
            split when the source grows. None keeps the source's own split, or puts all into `train`.
        seed: of all hashes.
        shard_size: the most images in a shard; a file of several frames is not cut.
        base: the dataset that is appended to.
        base_sha256: its identity.

    Raises:
        UserError: the source has its own split, a split stays empty, or a patient is in two splits.
    """
    if split is not None and source.splits is not None:
        raise UserError("--split: the source brings its own split; leave the option out, or remove the source's split")
    own = source.splits.dictionary.to_pylist() if source.splits is not None else ["train"]
    wanted = sorted(split) if split is not None else sorted(own)
    if split is not None:
        split_ids = _drawn(source, split, wanted, seed, bool(base.position))
    elif source.splits is not None:
        place = np.array([wanted.index(name) for name in own], np.int64)
        split_ids = place[source.splits.indices.to_numpy()]
    else:
        split_ids = np.zeros(len(source), np.int64)
    _refuse_shared_patients(source, split_ids, wanted, base.patients or {})
    named = source.names
    if source.instances is not None:  # which stay where they are when an export is made again, with other file names
        named = pc.coalesce(source.instances.cast(named.type), named)
    order = np.lexsort((_hashes(values(named), len(source), seed, b"order"), split_ids))
    pseudonyms = _pseudonyms(source, seed)
    numbers = np.arange(len(source)) if source.numbers is None else source.numbers
    frames = np.ones(len(source), np.int64) if source.frames is None else source.frames
    schema = pa.schema(
        [
            pa.field("number", pa.int64()),
            pa.field("name", pa.large_binary()),
            # Not as dictionaries: each row group would hold all patients there are.
            pa.field("patient", pa.string()),
            pa.field("pseudonym", pa.string()),
            *(pa.field(LABEL_PREFIX + name, pa.int32()) for name in source.labels),
        ]
    )
    jobs: list[_Planned] = []
    with pq.ParquetWriter(folder / PLAN_ROWS, schema, compression="zstd") as file:
        for name, start, stop in _cut(split_ids[order], frames[order], wanted, shard_size):
            rows = order[start:stop]
            split_number = sum(job.split == name for job in jobs) + (base.shards or {}).get(name, 0)
            jobs.append(
                _Planned(
                    split=name,
                    shard=f"{name}-{split_number:05d}.tar",
                    start=base.position + start,
                    sources=stop - start,
                    images=int(frames[rows].sum()),
                )
            )
            columns = [
                pa.array(base.number + numbers[rows]),
                source.names.take(rows),
                # A pseudonym made with a key stands for itself: who it was is not kept.
                pa.nulls(len(rows), pa.string()) if source.keyed else source.patients.take(rows).cast(pa.string()),
                pseudonyms.take(rows).cast(pa.string()),
                *(pa.array(column.ids[rows]) for column in source.labels.values()),
            ]
            file.write_table(pa.table(columns, schema=schema), row_group_size=1 << 30)
    rejected = source.rejected
    rejected = rejected.set_column(0, "number", pa.array(rejected.column("number").to_numpy() + base.number))
    pq.write_table(rejected, folder / PLAN_REJECTED)
    to_disk(folder / PLAN_REJECTED)
    plan = PlanFile(
        request=dict(request),
        base=base_sha256,
        found=source.found,
        labels={
            name: Vocabulary(version=column.version, names=column.names, source=column.source)
            for name, column in source.labels.items()
        },
        jobs=jobs,
        notes=list(source.notes),
        rows_sha256=to_disk(folder / PLAN_ROWS),
    )
    return plan


def _cut(split_ids: np.ndarray, frames: np.ndarray, splits: list[str], size: int) -> Iterable[tuple[str, int, int]]:
    """Stretches of one split with at most `size` images, or one file."""
    ends = np.cumsum(frames)
    for number, name in enumerate(splits):
        start, last = np.searchsorted(split_ids, (number, number + 1)).tolist()
        while start < last:
            before = int(ends[start - 1]) if start else 0
            stop = min(last, max(start + 1, int(np.searchsorted(ends, before + size, side="right"))))
            yield name, start, stop
            start = stop


def _hashes(names: Iterable[bytes], count: int, seed: int, use: bytes) -> np.ndarray:
    """A uint64 for each name."""
    salt = seed.to_bytes(8, "little")
    result = np.empty(count, "<u8")
    for place, name in enumerate(names):
        digest = hashlib.blake2b(name, digest_size=8, salt=salt, person=use).digest()
        result[place] = int.from_bytes(digest, "little")
    return result


def _encoded(words: Iterable[str]) -> list[bytes]:
    return [word.encode("utf-8", "surrogateescape") for word in words]


def _pseudonyms(source: Source, seed: int) -> pa.DictionaryArray:
    """The patients' names in the dataset: those made with a key, or numbers in the order of a hash."""
    if source.keyed:
        return source.patients
    known = source.patients.dictionary.to_pylist()
    ids = source.patients.indices.fill_null(-1).to_numpy()
    used = np.bincount(ids[ids >= 0], minlength=len(known)) > 0 if len(known) else np.zeros(0, bool)
    hashes = _hashes(_encoded(known), len(known), seed, b"patient")
    # The order of the list of patients must not show, so equal hashes go by name.
    rank = sorted((int(hashes[place]), known[place], place) for place in np.flatnonzero(used).tolist())
    words = [""] * len(known)
    for number, (_, _, place) in enumerate(rank, start=1):
        words[place] = f"p{number:07d}"
    return pa.DictionaryArray.from_arrays(source.patients.indices, pa.array(words, pa.string()))


def _drawn(source: Source, split: Mapping[str, float], names: list[str], seed: int, growing: bool) -> np.ndarray:
    """The split of each image, by the hash of its group; where unknown, of its patient, else of its name."""
    edges = np.cumsum([split[name] for name in names])[:-1]

    def drawn(units: Iterable[bytes], count: int) -> np.ndarray:
        return np.searchsorted(edges, _hashes(units, count, seed, b"split") / 2.0**64, side="right")

    # A prefix keeps a patient and a file of the same name apart.
    result = drawn((b"image:" + name for name in values(source.names)), len(source))
    for column, prefix in ((source.patients, b"patient:"), (source.groups, b"group:")):
        if column is not None and len(column.dictionary):
            words = _encoded(column.dictionary.to_pylist())
            by_word = drawn((prefix + word for word in words), len(words))
            ids = column.indices.fill_null(-1).to_numpy()
            result = np.where(ids >= 0, by_word[ids], result)
    for number, name in enumerate(names):
        if not growing and not (result == number).any():
            raise UserError(
                f"--split: {name!r} would get none of {len(source)} images, split by patient; try another --seed"
            )
    return result


def _refuse_shared_patients(
    source: Source, split_ids: np.ndarray, splits: list[str], before: Mapping[str, str]
) -> None:
    """The source's own split may be wrong: two splits with one patient leak the answer into the test."""
    ids = source.patients.indices.fill_null(-1).to_numpy()
    rows = np.flatnonzero(ids >= 0)
    first = np.full(len(source.patients.dictionary), -1, np.int64)
    first[ids[rows][::-1]] = rows[::-1]  # the first row of each patient is written last
    bad = rows[split_ids[rows] != split_ids[first[ids[rows]]]]
    if len(bad):
        j = int(bad[0])
        i = int(first[ids[j]])
        one, two = splits[split_ids[i]], splits[split_ids[j]]
        raise UserError(f"one patient is in two splits: {one!r} ({source.place(i)}) and {two!r} ({source.place(j)})")
    if before:
        for place, patient in enumerate(source.patients.dictionary.to_pylist()):
            row = int(first[place])
            if row >= 0 and before.get(patient, splits[split_ids[row]]) != splits[split_ids[row]]:
                raise UserError(
                    f"{source.place(row)}: its patient is in the split {before[patient]!r} of the dataset already, "
                    f"and would come into {splits[split_ids[row]]!r}"
                )


def read_plan(folder: Path) -> PlanFile | None:
    """The plan in `folder`, None where none was finished."""
    try:
        return PlanFile.model_validate_json((folder / PLAN).read_bytes())
    except FileNotFoundError:
        return None


def save_plan(folder: Path, plan: PlanFile) -> None:
    """Write plan.json, by which the plan counts as made."""
    part = folder / (PLAN + ".part")
    part.write_text(plan.model_dump_json(indent=1))
    to_disk(part)
    part.rename(folder / PLAN)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first option in which two requests differ, with both values; None where they are the same."""
    for name in sorted(set(old) | set(new)):
        one, two = (json.loads(json.dumps(side.get(name))) for side in (old, new))
        if one != two:
            return f"{name} was {shown(json.dumps(one).encode())} and is now {shown(json.dumps(two).encode())}"
    return None


def request_sha256(request: Mapping[str, Any]) -> str:
    """Tells whether a finished dataset was made by the same command; where it went is no part of it."""
    said = {name: value for name, value in request.items() if name != "out"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
