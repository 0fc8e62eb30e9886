"""Merge the records of all shards into index, quarantine, link table and dataset.json."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.audit import Audit
from data_prep.dataset import INDEX, QUARANTINE_SCHEMA, SHARDS, IndexWriter, to_disk, write_dataset
from data_prep.dataset_info import DatasetInfo, Deidentification, ShardInfo, Statistics
from data_prep.deduplicate import DROPPED, deduplicated
from data_prep.errors import UserError
from data_prep.options import Options
from data_prep.plan import MEASURED_SPLIT, PLAN_REJECTED, PLAN_ROWS, PlanFile, request_sha256
from data_prep.previous import Previous
from data_prep.records import Records
from data_prep.samples import MEASURE_SIDE
from data_prep.sources import shown
from data_prep.staging import LINKS, Staging
from data_prep.work import Tally, key_of


def finish(
    staging: Staging,
    plan: PlanFile,
    records: Records,
    options: Options,
    shown_options: Mapping[str, Any],
    claimed: Deidentification | None,
    previous: Previous | None,
    audit: Audit,
) -> tuple[DatasetInfo, list[str]]:
    """Write everything beside the shards into `staging.dataset` and `staging.private`; returns warnings too.

    Raises:
        Unusable: no image is left, or bit depths are mixed.
        UserError: duplicates were looked for with other options before a kill.
    """
    _refuse_nothing(plan, records, previous)
    found, warnings = deduplicated(staging, plan, records, options, previous)
    shards: dict[str, ShardInfo] = {}
    if previous is not None:
        shards = {shard.name: shard for shard in previous.info.shards}
        _keep_shards(staging, previous)
    jobs = {}
    for number, job in enumerate(plan.jobs):
        file, _ = records.said(number)
        if file is not None:
            shards[job.shard] = ShardInfo(name=job.shard, **file._asdict())
            jobs[job.shard] = number
    tallies = {channels: Tally() for channels in (1, 3)}
    index = IndexWriter(staging.dataset / INDEX, list(plan.labels))
    for name in sorted(shards):
        if name in jobs:
            result = records.load(jobs[name])
            index.add(result.rows)
            for channels, tally in result.tallies.items():
                tallies[channels].merge(tally)
        else:
            assert previous is not None
            index.add(_rows_of(previous.index, name, index.schema))
    refuse_mixed_depths(index.bit_depths)
    quarantine = _quarantine(staging, plan, records, previous)
    statistics = (
        previous.info.statistics
        if previous is not None  # a model's normalisation does not move when images are added
        else _statistics(tallies, max(index.bit_depths), index.channels, index.splits[MEASURED_SPLIT])
    )
    reasons = Counter(quarantine.column("reason").to_pylist())
    content = {
        "options": shown_options,
        "sources": plan.found + (previous.info.sources if previous is not None else 0),
        "reasons": dict(sorted(reasons.items())),
        "labels": {name: vocabulary.model_dump() for name, vocabulary in plan.labels.items()},
        "statistics": None if statistics is None else statistics.model_dump(),
        "duplicates": found.model_dump(),
        "deidentification": None if claimed is None else claimed.model_dump(),
        "shards": [shards[name].model_dump() for name in sorted(shards)],
    }
    info = write_dataset(staging.dataset, index, quarantine, content)
    _write_links(staging, plan, records, previous)
    audit.say(
        "finished",
        images=info.samples,
        quarantined=info.reasons,
        duplicates=info.duplicates.model_dump(),
        deidentification=content["deidentification"],
        dataset_sha256=to_disk(staging.dataset / "dataset.json"),
    )
    return info, warnings


class Unusable(UserError):
    """What was planned can never become a dataset: there is nothing to go on from."""


def refuse_mixed_depths(depths: Mapping[int, int]) -> None:
    """One dataset has one bit depth: a decoder is told which to give.

    Raises:
        Unusable: there are two.
    """
    if len(depths) > 1:
        raise Unusable(
            f"images of 8 bits ({depths[8]} so far) and of 16 bits ({depths[16]}) are mixed: "
            "prepare them as two datasets"
        )


def _refuse_nothing(plan: PlanFile, records: Records, previous: Previous | None) -> None:
    if previous is not None:
        return
    said = [records.said(number) for number in range(len(plan.jobs))]
    if not any(file for file, _ in said):
        reasons = Counter(entry[1] for _, rejected in said for entry in rejected)
        listed = ", ".join(f"{code} {count}" for code, count in reasons.most_common())
        raise Unusable(f"none of the {plan.found} images can be used ({listed}); nothing was written")


def _rows_of(index: pa.Table, shard: str, schema: pa.Schema) -> pa.Table:
    return index.filter(pc.equal(index.column("shard").cast(pa.string()), shard)).cast(schema)


def _keep_shards(staging: Staging, previous: Previous) -> None:
    """Bring the shards that stay into the new folder, as second names of the same files."""
    if staging.remote:
        return
    folder = staging.dataset / SHARDS
    folder.mkdir(exist_ok=True)
    for shard in previous.info.shards:
        for name in (shard.name, shard.name.removesuffix(".tar") + ".idx"):
            if (folder / name).exists():
                continue
            old = f"{staging.out}/{SHARDS}/{name}"
            try:
                os.link(old, folder / name)
            except OSError:  # a file system without second names
                shutil.copyfile(old, folder / (name + ".part"))
                to_disk(folder / (name + ".part"))
                (folder / (name + ".part")).rename(folder / name)


# Quarantine and links


def _quarantine(staging: Staging, plan: PlanFile, records: Records, previous: Previous | None) -> pa.Table:
    """Everything that was set aside, by its number in the source."""
    tables = [pq.read_table(staging.state / PLAN_REJECTED, columns=QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA)]
    rows = pq.ParquetFile(staging.state / PLAN_ROWS)
    for number, job in enumerate(plan.jobs):
        _, rejected = records.said(number)
        if rejected:
            numbers = rows.read_row_group(number, columns=["number"]).column("number").to_pylist()
            columns = list(zip(*((numbers[entry[0] - job.start], *entry[1:]) for entry in rejected), strict=True))
            tables.append(pa.table([list(column) for column in columns], schema=QUARANTINE_SCHEMA))
    table = pa.concat_tables(tables).sort_by([("number", "ascending"), ("reason", "ascending")])
    return table if previous is None else pa.concat_tables([previous.quarantine.cast(QUARANTINE_SCHEMA), table])


def _write_links(staging: Staging, plan: PlanFile, records: Records, previous: Previous | None) -> None:
    """The private table: a row a source, with its key or the reason it was left out; those of the plan in its order,
    then those that were set aside before it.
    """
    root = plan.request["source_root"]
    schema = pa.schema(
        [
            pa.field("number", pa.int64()),
            pa.field("root", pa.dictionary(pa.int32(), pa.string())),
            pa.field("path", pa.string()),
            pa.field("key", pa.string()),
            pa.field("patient", pa.string()),
            pa.field("pseudonym", pa.string()),
            pa.field("reason", pa.string()),
        ],
        metadata={"seed": str(plan.request["seed"]), "request": request_sha256(plan.request)},
    )
    rows = pq.ParquetFile(staging.state / PLAN_ROWS)
    with pq.ParquetWriter(staging.private / LINKS, schema, compression="zstd") as file:
        if previous is not None:
            file.write_table(previous.links.cast(schema))
        for number, job in enumerate(plan.jobs):
            table = rows.read_row_group(number)
            _, rejected = records.said(number)
            reasons = {entry[0]: entry[2] for entry in rejected}
            if any(entry[1] == DROPPED for entry in rejected):  # of a file of several frames some may have stayed
                for key in records.keys(number):
                    reasons.pop(int(key[:9]), None)
            positions = range(job.start, job.start + job.sources)
            columns: list[Any] = [
                table.column("number"),
                [root] * len(table),
                [shown(name) for name in table.column("name").to_pylist()],
                [None if position in reasons else key_of(position) for position in positions],
                table.column("patient"),
                table.column("pseudonym"),
                [reasons.get(position) for position in positions],
            ]
            file.write_table(pa.table(columns, schema=schema))
        table = pq.read_table(staging.state / PLAN_REJECTED)
        nothing = [None] * len(table)
        columns = [
            table.column("number"),
            [root] * len(table),
            [shown(name) for name in table.column("name").to_pylist()],
            nothing,
            nothing,
            table.column("patient"),
            table.column("message"),
        ]
        file.write_table(pa.table(columns, schema=schema))


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
        how=(f"every k-th row and column, k = max(1, shorter side // {MEASURE_SIDE}), of {which}"),
    )
