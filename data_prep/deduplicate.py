"""Find the images that stand there more than once and, where asked for, take them out of their shards.

What was found is written down before the first shard changes, so that a run that is killed here goes on.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data_prep.dataset import LABEL_PREFIX, SHARDS, to_disk
from data_prep.dataset_info import Duplicates
from data_prep.duplicates import Copies, contradictory, drop_exact, drop_near, exact, near, report
from data_prep.errors import UserError
from data_prep.options import Options
from data_prep.plan import PlanFile
from data_prep.previous import Previous
from data_prep.quarantine import REASONS
from data_prep.records import Records
from data_prep.shard import ShardWriter, members
from data_prep.staging import Staging
from data_prep.work import ShardResult

DROPPED = "duplicate"
_FOUND = "duplicates.json"


def deduplicated(
    staging: Staging, plan: PlanFile, records: Records, options: Options, previous: Previous | None
) -> tuple[Duplicates, list[str]]:
    """Search, write down, and drop; returns what dataset.json says of it, and warnings.

    Raises:
        UserError: the run was killed while it dropped duplicates, and goes on with other options.
    """
    path = staging.state / _FOUND
    asked = [options.duplicates, options.drop_duplicates]
    if path.exists():
        content = json.loads(path.read_text())
        if content["asked"] != asked:
            raise UserError(
                f"{staging.out}: a killed run was looking for duplicates with --duplicates {content['asked'][0]} "
                f"--drop-duplicates {content['asked'][1]}; go on with that, or --overwrite"
            )
    else:
        content = {"asked": asked, **_search(plan, records, options, previous)}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content))
        to_disk(part)
        part.rename(path)
    drop = set(content["drop"])
    if drop:
        for number in range(len(plan.jobs)):
            result = records.load(number)
            if not drop.isdisjoint(result.rows.column("key").to_pylist()):
                _rewrite(staging, plan, records, result, drop)
    found = Duplicates(kind=options.duplicates, found=content["found"], dropped=len(drop))  # type: ignore[arg-type]
    return found, content["warnings"]


def _search(plan: PlanFile, records: Records, options: Options, previous: Previous | None) -> dict[str, Any]:
    """Counts, warnings and the keys to drop; never of images that a dataset that is added to has already."""
    if options.duplicates == "off":
        return {"found": {}, "warnings": [], "drop": []}
    labels = [LABEL_PREFIX + name for name in plan.labels]
    columns = ["key", "patient", "split", "digest", "phash", *labels]
    tables = [records.load(number).rows.select(columns) for number in range(len(plan.jobs))]
    kept = 0
    if previous is not None:
        tables.insert(0, previous.index.select(columns).cast(tables[0].schema))
        kept = len(tables[0])
    rows = pa.concat_tables(tables).combine_chunks()
    del tables
    splits = rows.column("split").unify_dictionaries().combine_chunks()
    names, split_ids = splits.dictionary.to_pylist(), splits.indices.to_numpy()
    patients = rows.column("patient").unify_dictionaries().combine_chunks().indices.fill_null(-1).to_numpy() + 1
    digests = np.frombuffer(b"".join(rows.column("digest").to_pylist()), np.uint8).reshape(-1, 16)
    found: dict[str, int] = {}
    warnings: list[str] = []
    dropped = np.zeros(len(rows), bool)
    same = exact(digests)
    _count(found, warnings, "exact", same, patients, split_ids, options.drop_duplicates)
    ids = np.stack([rows.column(name).to_numpy() for name in labels], axis=1) if labels else np.zeros((len(rows), 0))
    odd = len(contradictory(same, ids))
    if odd:
        warnings.append(f"{odd} images have an exact copy with another label: one of the two is wrong")
        found["exact_contradictory"] = odd
    if options.drop_duplicates != "off":
        dropped[drop_exact(same, split_ids, names)] = True
    if options.duplicates == "near":
        try:
            alike = near(rows.column("phash").to_numpy())
        except UserError as error:
            # Too many to list is a finding and no reason to lose the run; what was asked for is said not to be done.
            warnings.append(f"near copies were not counted: {error}")
        else:
            _count(found, warnings, "near", alike, patients, split_ids, options.drop_duplicates)
            if options.drop_duplicates == "near":
                dropped[drop_near(alike, split_ids, names)] = True
    dropped[:kept] = False
    return {"found": found, "warnings": warnings, "drop": rows.column("key").filter(pa.array(dropped)).to_pylist()}


def _count(
    found: dict[str, int],
    warnings: list[str],
    kind: Literal["exact", "near"],
    copies: Copies,
    patients: np.ndarray,
    split_ids: np.ndarray,
    dropping: str,
) -> None:
    """Add the report of one kind, and a warning on what crosses splits and is not dropped."""
    counted = report(copies, patients, split_ids)
    found |= {f"{kind}_{name}": value for name, value in asdict(counted).items()}
    if counted.across_splits and dropping not in (kind, "near"):
        what = "an exact copy" if kind == "exact" else "a look-alike, perhaps a near copy,"
        warnings.append(
            f"{counted.across_splits} images have {what} in another split; --drop-duplicates {kind} keeps one"
        )


def _rewrite(staging: Staging, plan: PlanFile, records: Records, result: ShardResult, drop: set[str]) -> None:
    """Write a shard again without some of its samples."""
    shard = plan.jobs[result.number].shard
    rows = result.rows.to_pylist()
    kept: list[dict[str, Any]] = []
    rejected = list(result.rejected)
    store = staging.store
    with store.scratch() as scratch, store.local(f"{SHARDS}/{shard}") as old, old.open("rb") as file:
        with ShardWriter(scratch / shard) as writer:
            walk = members(old)
            for row, image, record in zip(rows, walk, walk, strict=True):
                if row["key"] in drop:
                    position = int(row["key"][:9])
                    rejected.append((position, DROPPED, REASONS[DROPPED], row["patient"], row["instance"]))
                    continue
                data = []
                for member in (image, record):
                    file.seek(member.offset)
                    data.append(file.read(member.size))
                kept.append({**row, "offset": writer.add(row["key"], row["extension"], *data)})
            written = writer.close() if kept else None
        if written is not None:
            for ending in (".idx", ".tar"):
                path = (scratch / shard).with_suffix(ending)
                store.add(path, f"{SHARDS}/{path.name}")
    if written is None:
        for ending in (".tar", ".idx"):
            store.remove(f"{SHARDS}/{shard.removesuffix('.tar')}{ending}")
    table = pa.Table.from_pylist(kept, schema=result.rows.schema)
    records.save(ShardResult(result.number, result.sources, written, table, sorted(rejected), result.tallies))
