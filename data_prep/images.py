"""Pictures in, a dataset out: plan, work, finish, and one rename that makes the result visible."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dataset import (
    LABEL_PREFIX,
    QUARANTINE_SCHEMA,
    SHARDS,
    DatasetInfo,
    ShardInfo,
    Statistics,
    index_schema,
    write_dataset,
)
from data_prep.errors import UserError
from data_prep.labels import ClassMap, apply_class_map, load_class_map
from data_prep.plan import MEASURED_SPLIT, Plan, make_plan
from data_prep.pool import run
from data_prep.samples import MEASURE_SIDE, MEASURED_SCALE
from data_prep.shard import EXTENSIONS
from data_prep.sources import Source, open_source, with_patient_pattern
from data_prep.staging import LINKS, Staging
from data_prep.work import ShardResult, Tally, Task, key_of, pseudonym_of

SHARD_SIZE = 2048
# Train images behind mean and standard deviation. The images are shuffled, so 16,384 tell both to about 0.002; where
# nothing else is decoded, each costs more.
MEASURED = 16_384
MEASURED_TRUSTED = 4096


@dataclass(frozen=True)
class Summary:
    """What a run did. `rejected` counts quarantined images by reason; `warnings` are for the user to read."""

    out: Path
    private: Path
    info: DatasetInfo
    rejected: dict[str, int]
    warnings: list[str]
    seconds: float


def prepare(
    source: Path,
    out: Path,
    *,
    labels: str | None = None,
    label_columns: Sequence[str] | None = None,
    patient_pattern: str | None = None,
    split: Mapping[str, float] | None = None,
    seed: int = 0,
    resize: int | None = None,
    trust_images: bool = False,
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Turn a folder, a manifest or an .npz file into a dataset in folder `out`.

    The result depends on the images and the options alone, not on `workers`. Beside it, in `OUT.private`, lies the
    table that links samples to their sources; it must not leave with the dataset.

    Args:
        source: see `open_source`.
        out: a folder that does not exist yet.
        labels: a labels file (path or shipped name) that gives modality and anatomy by class.
        label_columns: the label columns to keep; None keeps all.
        patient_pattern: see `with_patient_pattern`.
        split: fractions by split name, see `parse_split`.
        seed: of shuffle, split and pseudonyms, 0 <= seed < 2**63. It is kept with the link table and not in the
            dataset: with the seed and a list of all patients, the order of the pseudonyms could be worked out.
        resize: the largest shorter side in pixels; larger images shrink to it.
        trust_images: do not decode images that pass through.
        shard_size: the most images in a shard.
        workers: processes.
        overwrite: replace a dataset in `out`.
        on_progress: called now and then with images done and images in all.

    Raises:
        UserError: anything in the source or the options that cannot be used; `out` is then left as it was.
    """
    started = time.monotonic()
    for name, value in (("shard-size", shard_size), ("workers", workers), ("resize", 1 if resize is None else resize)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, not {seed}")
    _refuse_nesting(source, out)
    class_map = None if labels is None else load_class_map(labels)
    images = open_source(source, label_columns)
    if patient_pattern is not None:
        images = with_patient_pattern(images, patient_pattern)
    images, notes = _with_class_map(images, class_map)
    plan = make_plan(images, split, seed, shard_size)
    options = {
        "source": images.kind,
        "labels_sha256": None if class_map is None else class_map.digest,
        "split": None if split is None else dict(split),
        "resize": resize,
        "trust_images": trust_images,
        "shard_size": shard_size,
    }
    with _writable(out), Staging(out, overwrite) as staging:
        root = images.root if images.kind == "files" else _unpacked(images.root, images, staging.private / "arrays")
        names = {name: column.names for name, column in images.labels.items()}
        task = Task(images.kind, root, staging.folder / SHARDS, resize, trust_images, names)
        jobs = plan.jobs(images, MEASURED_TRUSTED if trust_images else MEASURED)
        results: list[ShardResult] = []
        with contextlib.closing(run(task, jobs, min(workers, len(plan.bounds)), len(images), on_progress)) as running:
            for result in running:
                results.append(result)
                _refuse_mixed_depths(results)
        results.sort(key=lambda result: result.number)
        if images.kind == "npz":
            shutil.rmtree(root)
        info = _finish(staging.folder, images, plan, results, options)
        _write_links(staging.private / LINKS, images, plan, results, seed)
        staging.commit()
    rejected = Counter(code for result in results for _, code, _ in result.rejected)
    return Summary(staging.out, staging.final_private, info, dict(rejected), notes, time.monotonic() - started)


def _refuse_nesting(source: Path, out: Path) -> None:
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or outer in inner.parents or (inner in outer.parents and inner.is_dir()):
        raise UserError(f"the output {out} and the source {source} lie inside each other")


def _with_class_map(source: Source, class_map: ClassMap | None) -> tuple[Source, list[str]]:
    """The source with modality and anatomy from its classes, and warnings."""
    if class_map is None:
        return source, []
    columns, notes = apply_class_map(class_map, source.labels.get("class"), len(source))
    both = sorted(set(columns) & set(source.labels))
    if both:
        raise UserError(f"--labels: the source has a column {both[0]!r} already; give one or the other")
    return replace(source, labels={**source.labels, **columns}), notes


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    """A full disk or a missing permission is something the user can mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{out} cannot be written: {error.strerror}; nothing was kept") from None
        raise


def _unpacked(path: Path, source: Source, folder: Path) -> Path:
    """The image arrays of an .npz file as plain .npy files that every worker can map, whatever their size."""
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        for split in dict.fromkeys(source.splits or ()):
            name = f"{split}_images.npy"
            try:
                with archive.open(name) as packed, (folder / name).open("xb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path}: {split}_images is damaged: {error}") from None
    return folder


def _refuse_mixed_depths(results: Sequence[ShardResult]) -> None:
    """One dataset has one bit depth: a decoder is told which to give."""
    depths = Counter[int]()
    for result in results:
        depths.update(result.rows[:, 6].tolist())
    if len(depths) > 1:
        raise UserError(
            f"images of 8 bits ({depths[8]} so far) and of 16 bits ({depths[16]}) are mixed: "
            "prepare them as two datasets"
        )


def _finish(
    folder: Path, source: Source, plan: Plan, results: Sequence[ShardResult], options: Mapping[str, Any]
) -> DatasetInfo:
    """Give the shards their names, and write index, quarantine and dataset.json in plan order."""
    numbers: Counter[str] = Counter()
    shards: list[ShardInfo] = []
    filled = [result for result in results if result.file is not None]
    rejected = [entry for result in results for entry in result.rejected]
    if not filled:
        reasons = Counter(code for _, code, _ in rejected)
        listed = ", ".join(f"{code} {count}" for code, count in reasons.most_common())
        raise UserError(f"none of the {len(source)} images can be used ({listed}); nothing was written")
    for result in filled:
        assert result.file is not None
        name = f"{result.split}-{numbers[result.split]:05d}"
        numbers[result.split] += 1
        for ending in (".tar", ".idx"):
            result.path.with_suffix(ending).rename(folder / SHARDS / (name + ending))
        shards.append(ShardInfo(name=name + ".tar", **result.file._asdict()))
    rows = np.concatenate([result.rows for result in filled])
    shard_of = np.repeat(np.arange(len(filled)), [len(result.rows) for result in filled])
    index = _index(source, plan, rows, shard_of, [shard.name for shard in shards])
    numbered = [(int(plan.order[position]), code, message) for position, code, message in rejected]
    columns = list(zip(*sorted(numbered), strict=True)) or [(), (), ()]
    quarantine = pa.table([list(column) for column in columns], schema=QUARANTINE_SCHEMA)
    tallies = {channels: Tally() for channels in (1, 3)}
    for result in results:
        for channels, tally in result.tallies.items():
            tallies[channels].merge(tally)
    train = sum(shard.samples for shard, result in zip(shards, filled, strict=True) if result.split == MEASURED_SPLIT)
    statistics = _statistics(tallies, int(rows[:, 6].max()), int(rows[:, 7].max()), train)
    return write_dataset(folder, index, quarantine, shards, source.labels, options, statistics)


def _index(source: Source, plan: Plan, rows: np.ndarray, shard_of: np.ndarray, shards: list[str]) -> pa.Table:
    """index.parquet, from the columns of `ShardResult.rows` and what the plan knows by position."""
    positions = rows[:, 0]
    numbers = plan.order[positions]
    pseudonyms = plan.pseudonyms[positions].tolist()

    def words(ids: np.ndarray, names: Sequence[str]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(ids.astype(np.int32)), pa.array(names, pa.string()))

    columns = {
        "key": pa.array([key_of(position) for position in positions.tolist()], pa.string()),
        "shard": words(shard_of, shards),
        "offset": rows[:, 1],
        "length": rows[:, 2],
        "extension": words(rows[:, 3], EXTENSIONS),
        "width": rows[:, 4].astype(np.int32),
        "height": rows[:, 5].astype(np.int32),
        "bit_depth": rows[:, 6].astype(np.int8),
        "channels": rows[:, 7].astype(np.int8),
        "patient": pa.array([pseudonym_of(number) if number else None for number in pseudonyms], pa.string()),
        "split": words(plan.split_ids[positions], plan.splits),
        **{LABEL_PREFIX + name: column.ids[numbers] for name, column in source.labels.items()},
    }
    return pa.table(columns, schema=index_schema(list(source.labels)))


def _statistics(tallies: Mapping[int, Tally], bit_depth: int, channels: int, train: int) -> Statistics | None:
    """Mean and standard deviation in 0..1; a gray image counts in every channel of a colour dataset."""
    total = Tally()
    for width, tally in tallies.items():
        repeat = channels // width
        if tally.images:
            total.merge(Tally(tally.images, tally.pixels, tally.sums * repeat, tally.squares * repeat))
    if not total.pixels:
        return None
    scale = 2**bit_depth - 1
    means = [value / total.pixels for value in total.sums]
    deviations = [
        math.sqrt(max(0.0, square / total.pixels - mean * mean))
        for square, mean in zip(total.squares, means, strict=True)
    ]
    which = f"all images of {MEASURED_SPLIT}"
    if total.images < train:
        which = f"the first images of each shard of {MEASURED_SPLIT} (they are shuffled)"
    return Statistics(
        mean=[round(mean / scale, 6) for mean in means],
        std=[round(deviation / scale, 6) for deviation in deviations],
        images=total.images,
        how=(
            f"every k-th row and column, k = max(1, shorter side // {MEASURE_SIDE}), of {which}; "
            f"JPEG that pass through at the smallest of their scales that keeps {MEASURED_SCALE} pixels a side"
        ),
    )


def _write_links(path: Path, source: Source, plan: Plan, results: Sequence[ShardResult], seed: int) -> None:
    """The private table: a row a source image in plan order, with its key or the reason it was left out."""
    reasons = {position: message for result in results for position, _, message in result.rejected}
    rows = plan.order.tolist()
    names = [source.names[row].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for row in rows]
    pseudonyms = [pseudonym_of(number) if number else None for number in plan.pseudonyms.tolist()]
    table = pa.table(
        {
            "number": plan.order,
            "path": names,
            "key": [None if position in reasons else key_of(position) for position in range(len(rows))],
            "patient": pa.array([source.patients[row] for row in rows], pa.string()),
            "pseudonym": pa.array(pseudonyms, pa.string()),
            "reason": pa.array([reasons.get(position) for position in range(len(rows))], pa.string()),
        }
    ).replace_schema_metadata({"seed": str(seed), "source": str(source.root.resolve())})
    pq.write_table(table, path, compression="zstd")
    os.chmod(path, 0o600)
