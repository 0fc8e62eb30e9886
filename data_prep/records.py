"""What became of each shard, kept beside the plan, so that a run goes on where it was killed."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dataset import SHARDS, to_disk
from data_prep.errors import WorkFailed
from data_prep.plan import PlanFile
from data_prep.shard import ShardFile
from data_prep.store import Store, folder_to_disk
from data_prep.work import ShardResult, Tally

_META = b"medpretrain"


class Records:
    """The records of a plan's shards, a Parquet file each: rows of the index, and the rest as its metadata."""

    def __init__(self, folder: Path, plan: PlanFile, store: Store) -> None:
        self._folder = folder
        self._plan = plan
        self._store = store

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.parquet"

    def save(self, result: ShardResult) -> None:
        """Keep a result; it appears whole, after its shard did.

        Raises:
            WorkFailed: the shard is not there: the worker sees another folder under the name of OUT.
        """
        if result.file is not None and not self._there(result.number, result.file):
            name = self._plan.jobs[result.number].shard
            raise WorkFailed(f"{name} was written but is not there: every worker must see the same OUT")
        said = {
            "sources": result.sources,
            "file": None if result.file is None else result.file._asdict(),
            "rejected": result.rejected,
            "tallies": {channels: asdict(tally) for channels, tally in result.tallies.items()},
        }
        table = result.rows.replace_schema_metadata({_META: json.dumps(said).encode()})
        # A name of its own: the same shard may be in two parts, where n was changed between commands.
        part = self._path(result.number).with_suffix(f".{secrets.token_hex(4)}.part")
        pq.write_table(table, part, compression="zstd")
        to_disk(part)
        part.rename(self._path(result.number))
        folder_to_disk(self._folder)

    def load(self, number: int) -> ShardResult:
        """A kept result."""
        table = pq.read_table(self._path(number))
        said = json.loads(table.schema.metadata[_META])
        return ShardResult(
            number,
            said["sources"],
            None if said["file"] is None else ShardFile(**said["file"]),
            table.replace_schema_metadata(None),
            [tuple(entry) for entry in said["rejected"]],
            {int(channels): Tally(**tally) for channels, tally in said["tallies"].items()},
        )

    def said(self, number: int) -> tuple[ShardFile | None, list[tuple[int, str, str, str | None, str | None]]]:
        """The file and the rejected sources of a kept result, without its rows."""
        said = json.loads(pq.read_schema(self._path(number)).metadata[_META])
        file = None if said["file"] is None else ShardFile(**said["file"])
        return file, [tuple(entry) for entry in said["rejected"]]

    def keys(self, number: int) -> list[str]:
        """The keys of a kept result's samples."""
        return list(pq.read_table(self._path(number), columns=["key"]).column("key").to_pylist())

    def done(self, number: int) -> bool:
        """Whether a shard was recorded and is still there, with its index."""
        try:
            file, _ = self.said(number)
        except (FileNotFoundError, pa.ArrowInvalid, KeyError):
            return False
        return file is None or self._there(number, file)

    def _there(self, number: int, file: ShardFile) -> bool:
        name = f"{SHARDS}/{self._plan.jobs[number].shard}"
        index = name.removesuffix(".tar") + ".idx"
        return self._store.size(name) == file.bytes and self._store.size(index) is not None
