"""What a careful forger of datasets needs: to take one apart, and to put it together with hashes that match."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dataset import canonical, checksum, file_sha256
from data_prep.shard import ShardWriter, members

Row = dict[str, Any]


def read_json(dataset: Path) -> dict[str, Any]:
    return dict(json.loads((dataset / "dataset.json").read_bytes()))


def write_json(dataset: Path, content: dict[str, Any]) -> None:
    content["checksum"] = checksum(content)
    (dataset / "dataset.json").write_bytes(canonical(content))


def rehash(dataset: Path) -> None:
    """Make dataset.json agree with the files again."""
    content = read_json(dataset)
    for name in ("index", "quarantine"):
        content[f"{name}_sha256"] = file_sha256(dataset / f"{name}.parquet")
    for shard in content["shards"]:
        tar = dataset / "shards" / shard["name"]
        shard.update(bytes=tar.stat().st_size, sha256=file_sha256(tar), idx_sha256=file_sha256(tar.with_suffix(".idx")))
    write_json(dataset, content)


def read_rows(dataset: Path, name: str = "index") -> list[Row]:
    return list(pq.read_table(dataset / f"{name}.parquet").to_pylist())


def write_rows(dataset: Path, rows: list[Row], name: str = "index") -> None:
    file = dataset / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)


@dataclass
class Forged:
    """A sample taken apart."""

    row: Row
    image: bytes
    record: dict[str, Any]

    def say(self, **values: Any) -> None:
        """Change row and record alike."""
        self.row |= values
        self.record |= values


def take_apart(dataset: Path) -> list[Forged]:
    samples = []
    for shard in sorted((dataset / "shards").glob("*.tar")):
        data = shard.read_bytes()
        walk = [data[member.offset : member.offset + member.size] for member in members(shard)]
        samples += list(zip(walk[::2], walk[1::2], strict=True))
    return [Forged(row, *pair[:1], json.loads(pair[1])) for row, pair in zip(read_rows(dataset), samples, strict=True)]


def put_together(dataset: Path, samples: list[Forged]) -> None:
    """Write shards, indexes, counts of patients and splits, and hashes anew."""
    content = read_json(dataset)
    for shard in content["shards"]:
        mine = [sample for sample in samples if sample.row["shard"] == shard["name"]]
        tar = dataset / "shards" / shard["name"]
        tar.unlink()
        tar.with_suffix(".idx").unlink()
        writer = ShardWriter(tar)
        for sample in mine:
            record = json.dumps(sample.record, separators=(",", ":")).encode()
            offset = writer.add(sample.row["key"], sample.row["extension"], sample.image, record)
            sample.row |= {"offset": offset, "length": len(sample.image)}
        writer.close()
        shard["samples"] = len(mine)
    rows = [sample.row for sample in samples]
    write_rows(dataset, rows)
    patients = Counter(row["patient"] for row in rows)
    without = patients.pop(None, 0)
    content["patients"] = {
        "known": len(patients),
        "images_without": without,
        "most_images": max(patients.values(), default=0),
    }
    content["splits"] = dict(Counter(row["split"] for row in rows))
    write_json(dataset, content)
    rehash(dataset)


def contents(dataset: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in dataset.rglob("*") if file.is_file()}
