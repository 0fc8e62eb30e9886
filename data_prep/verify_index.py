"""What only the whole index can tell: its counts, and whether a patient, study, series or image is in two splits.

Of every row a few numbers are kept (52 bytes); the rows themselves pass by, shard after shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_prep.dataset import INDEX, INFO, LABEL_PREFIX, QUARANTINE, QUARANTINE_SCHEMA, index_schema
from data_prep.dataset_info import DatasetInfo, ShardInfo
from data_prep.quarantine import REASONS
from data_prep.verify_shard import Problem

_BATCH = 1 << 16
_NOT_PARQUET = "is no readable Parquet file"
# What must not be in two splits, and how a problem names it
_WHOLE = {"patient": "patients", "study": "studies", "series": "series"}


class Index:
    """index.parquet as a stream, and what is remembered of it.

    `problems` grows while `shards` is iterated; `judge` then says what is wrong with the whole.
    """

    def __init__(self, path: Path, info: DatasetInfo) -> None:
        self.problems: list[Problem] = []
        self.rows = 0
        self.has_frames = False
        self._path = path
        self._info = info
        self._splits: dict[str, int] = {}
        self._depths: set[int] = set()
        self._channels = 0
        self._bad_labels: Counter[str] = Counter()
        # Of each row: its split, digest, and xxh3_64 of its key and of the names in _WHOLE (0 for none)
        self._kept: dict[str, list[np.ndarray]] = {name: [] for name in ("split", "digest", "key", *_WHOLE)}

    def shards(self) -> Iterator[tuple[ShardInfo, pa.Table | None]]:
        """Each shard with its rows, words instead of dictionary codes; None from where the index cannot be followed."""
        batches = self._batches()
        held = pa.schema([pa.field("shard", pa.string())]).empty_table()
        for shard in self._info.shards:
            while len(held) < shard.samples and (batch := next(batches, None)) is not None:
                held = pa.concat_tables([held, batch]) if len(held) else batch
            mine, held = held.slice(0, shard.samples), held.slice(shard.samples)
            if self.problems:
                yield shard, None
                continue
            names = Counter(mine.column("shard").to_pylist())
            if names != {shard.name: shard.samples}:
                what = f"has {names[shard.name]} rows for {shard.name} in its place, which holds {shard.samples}"
                self.problems.append(Problem(INDEX, what))
                yield shard, None
                continue
            # A copy, for a slice would take all of its batch along to another process.
            yield shard, mine.take(pa.array(np.arange(len(mine))))
        if not self.problems and (len(held) or next(batches, None) is not None):
            self.problems.append(Problem(INDEX, "has more rows than the shards have samples"))

    def _batches(self) -> Iterator[pa.Table]:
        try:
            file = pq.ParquetFile(self._path)
            if file.schema_arrow.remove_metadata() != index_schema(list(self._info.labels)):
                self.problems.append(Problem(INDEX, f"does not have the columns that {INFO} announces"))
                return
            for batch in file.iter_batches(batch_size=_BATCH):
                batch.validate(full=True)
                if any(batch.column(cell.name).null_count for cell in batch.schema if not cell.nullable):
                    self.problems.append(Problem(INDEX, "has empty cells"))
                    return
                if len(batch):
                    self._keep(batch)
                plain = [
                    column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
                    for column in batch.columns
                ]
                yield pa.table(plain, names=batch.schema.names)
        except (pa.ArrowException, OSError):
            self.problems.append(Problem(INDEX, _NOT_PARQUET))

    def _keep(self, batch: pa.RecordBatch) -> None:
        self.rows += len(batch)
        split = batch.column("split").dictionary_decode().dictionary_encode()  # without words that no row has
        codes = [self._splits.setdefault(word, len(self._splits)) for word in split.dictionary.to_pylist()]
        self._kept["split"].append(np.array(codes, np.int32)[split.indices.to_numpy()])
        digests = b"".join(batch.column("digest").to_pylist())
        self._kept["digest"].append(np.frombuffer(digests, np.uint64).reshape(-1, 2))
        for name in ("key", *_WHOLE):
            self._kept[name].append(_hashes(batch.column(name)))
        self._depths.update(batch.column("bit_depth").unique().to_pylist())
        self._channels = max(self._channels, pc.max(batch.column("channels")).as_py())
        self.has_frames |= batch.column("frame").null_count < len(batch)
        for name, vocabulary in self._info.labels.items():
            ids = batch.column(LABEL_PREFIX + name).to_numpy()
            self._bad_labels[name] += int(((ids < -1) | (ids >= len(vocabulary.names))).sum())

    def judge(self) -> list[Problem]:
        """What is wrong with the whole, once all shards were taken; to be asked of an index without `problems`."""
        kept = {name: np.concatenate(parts) for name, parts in self._kept.items()}
        splits = dict(zip(self._splits, np.bincount(kept["split"]).tolist(), strict=True))
        patients = np.unique(kept["patient"][kept["patient"] != 0], return_counts=True)[1]
        info = self._info
        found = [
            _claim("samples", info.samples, self.rows),
            _claim("splits", info.splits, splits),
            _claim("known patients", info.patients.known, len(patients)),
            _claim("images without a patient", info.patients.images_without, int((kept["patient"] == 0).sum())),
            _claim("most images of a patient", info.patients.most_images, int(patients.max(initial=0))),
            _claim("bit depths", [info.bit_depth], sorted(self._depths)),
            _claim("channels", info.channels, self._channels),
        ]
        for name, count in self._bad_labels.items():
            if count:
                found.append(Problem(INDEX, f"has {count} ids of the label {name!r} outside its vocabulary"))
        problems = [problem for problem in found if problem is not None]
        twice = _repeated(kept["key"][:, None], np.arange(self.rows))
        if twice is not None:
            problems.append(Problem(INDEX, f"keys twice: {twice[0]}, such as {self._value('key', twice[1])}"))
        for name, many in _WHOLE.items():
            rows = np.flatnonzero(kept[name])
            shared = _repeated(kept[name][rows][:, None], kept["split"][rows])
            if shared is not None:
                count, one, two = shared[0], int(rows[shared[1]]), int(rows[shared[2]])
                places = f"{self._value('split', one)} and {self._value('split', two)}"
                what = f"{many} in two splits: {count}, such as {self._value(name, one)} in {places}"
                problems.append(Problem(INDEX, what))
        shared = _repeated(kept["digest"], kept["split"])
        if shared is not None:
            first, second = (f"{self._value('key', row)} in {self._value('split', row)}" for row in shared[1:])
            what = (
                f"images in two splits: {shared[0]}, such as {first} and {second}; "
                "prepare with --drop-duplicates exact takes them out"
            )
            problems.append(Problem(INDEX, what))
        return problems

    def _value(self, column: str, row: int) -> str:
        """A value by its row: read again, for it was not kept."""
        start = 0
        for batch in pq.ParquetFile(self._path).iter_batches(batch_size=_BATCH, columns=[column]):
            if row < start + len(batch):
                return str(batch.column(0)[row - start].as_py())
            start += len(batch)
        raise AssertionError(row)


def _claim(what: str, claimed: object, found: object) -> Problem | None:
    return None if claimed == found else Problem(INFO, f"{what}: it says {claimed}, and {INDEX} has {found}")


def _hashes(column: pa.Array) -> np.ndarray:
    """A uint64 for each text, 0 for null."""
    coded = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    words = [xxhash.xxh3_64_intdigest(word.encode()) for word in coded.dictionary.to_pylist()]
    return np.array([*words, 0], np.uint64)[coded.indices.fill_null(len(words)).to_numpy()]


def _repeated(values: np.ndarray, units: np.ndarray) -> tuple[int, int, int] | None:
    """Values that are found in more than one unit.

    Args:
        values: (N, W) uint64.
        units: (N,) integers.

    Returns:
        How many such values, and two rows of the one that comes first; None where there is none.
    """
    order = np.lexsort((units, *values.T))
    same = (values[order[1:]] == values[order[:-1]]).all(axis=1)
    shared = np.flatnonzero(same & (units[order[1:]] != units[order[:-1]]))
    if not len(shared):
        return None
    group = np.concatenate([[0], np.cumsum(~same)])
    first = shared[np.argmin(np.minimum(order[shared], order[shared + 1]))]
    one, two = sorted((int(order[first]), int(order[first + 1])))
    return len(np.unique(group[shared])), one, two


def quarantine_problems(path: Path, info: DatasetInfo, has_frames: bool) -> list[Problem]:
    """Compare quarantine.parquet with dataset.json, and its messages with the list of reasons."""
    reasons: Counter[str] = Counter()
    problems: list[Problem] = []
    try:
        file = pq.ParquetFile(path)
        if file.schema_arrow.remove_metadata() != QUARANTINE_SCHEMA:
            return [Problem(QUARANTINE, "does not have the columns of a quarantine")]
        for batch in file.iter_batches(batch_size=_BATCH, columns=["number", "reason", "message"]):
            batch.validate(full=True)
            for row in batch.to_pylist():
                reasons[row["reason"]] += 1
                phrase = REASONS.get(row["reason"])
                known = phrase is not None and f"{row['message']}: ".startswith(f"{phrase}: ")  # a detail may follow
                if row["number"] < 0 or not known:
                    problems.append(Problem(QUARANTINE, f"source {row['number']} has no proper reason"))
    except (pa.ArrowException, OSError):
        return [Problem(QUARANTINE, _NOT_PARQUET)]
    count = sum(reasons.values())
    if (info.quarantined, info.reasons) != (count, dict(reasons)):
        problems.append(Problem(QUARANTINE, f"has {count} images; {INFO} says {info.quarantined}, or other reasons"))
    if not has_frames and info.sources != info.samples + info.quarantined:
        what = f"{info.sources} sources became {info.samples} images and {info.quarantined} in quarantine"
        problems.append(Problem(INFO, what))
    if info.duplicates.dropped > info.reasons.get("duplicate", 0):
        problems.append(Problem(INFO, f"says that {info.duplicates.dropped} duplicates were dropped; {QUARANTINE} not"))
    return problems[:20]
