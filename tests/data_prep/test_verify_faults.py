"""`prep verify` finds every one of more than 500 injected faults: by accident, by hand, and by a careful forger."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import verify_readers
from data_prep.images import FileReader, Images
from data_prep.options import Options, Running
from data_prep.prepare import prepare
from data_prep.samples import from_array
from data_prep.verify import verify
from data_prep.work import Picture
from tests.data_prep.faults import FAULTS, NAMED
from tests.data_prep.forger import (
    contents,
    put_together,
    read_json,
    read_rows,
    rehash,
    take_apart,
    write_json,
    write_rows,
)


class ScanReader(FileReader):
    """Every picture as an instance of a series of a study; every fifth has a second frame."""

    def read(self, name: bytes, measure: bool) -> Iterator[Picture]:  # type: ignore[override]
        (picture,) = super().read(name, measure)
        patient = name.decode().rpartition("/")[2].partition("_")[0]
        who = {"study": f"s{patient}", "series": f"r{patient}", "instance": f"i{patient}-{len(name)}-{hash_of(name)}"}
        about = {"Rows": picture.sample.height}
        if hash_of(name) % 5:
            yield Picture(picture.sample, **who, about=about)
            return
        yield Picture(picture.sample, **who, frame=0, about=about)
        pixels = np.full((20, 30), hash_of(name) % 251, np.uint8)
        pixels[5:9, 3:7] = 255
        pixels[0, :8] = list(hash_of(name).to_bytes(8, "big"))
        yield Picture(from_array(pixels), **who, frame=1, about=about)


def hash_of(name: bytes) -> int:
    return int.from_bytes(name, "big") % 1_000_003


class Scans(Images):
    def reader(self, state: Path) -> ScanReader:
        return ScanReader(self.root, self.resize, self.trust_images)


@pytest.fixture
def dataset(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures of 10 patients in three splits, and three in quarantine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(verify_readers, "installed", lambda reader: False)
    for number, data in enumerate((b"", b"nothing", b"")):
        (tree / "cat" / f"{100 + number}_bad.png").write_bytes(data)
    kind = Scans(tree, None, None, r"(\d+)_", None, False, None)
    split = {"train": 0.5, "val": 0.25, "test": 0.25}
    prepare(kind, tmp_path / "out", Options(split, seed=3, shard_size=4, duplicates="off"), Running())
    found = verify(tmp_path / "out")
    assert found == []
    assert found.info is not None
    assert set(found.info.splits) == set(split)
    assert len(found.info.reasons) == 2
    assert pq.read_table(tmp_path / "out" / "index.parquet").column("frame").null_count < found.info.samples
    return tmp_path / "out"


def test_every_injected_fault_is_found(dataset: Path, rng: random.Random) -> None:
    whole = contents(dataset)
    missed = []
    table = []
    for kind, (times, decode, inject) in FAULTS.items():
        found = 0
        for _ in range(times):
            said = inject(dataset, rng)
            assert contents(dataset) != whole, (kind, said)
            problems = verify(dataset, quick=not decode)
            if any(NAMED.get(kind, "") in str(problem) for problem in problems):
                found += 1
                assert all(str(dataset) not in str(problem) for problem in problems), problems
            else:
                missed.append((kind, said))
            now = contents(dataset)
            for file in now.keys() - whole.keys():
                file.unlink()
            for file, data in whole.items():
                if now.get(file) != data:
                    file.write_bytes(data)
        table.append((kind, times, found))
    injected = sum(times for _, times, _ in table)
    print("\n".join(f"{kind:55} {times:4} injected {found:4} found" for kind, times, found in table))
    print(f"{'in all':55} {injected:4} injected {sum(found for *_, found in table):4} found")
    assert not missed
    assert injected >= 500
    assert verify(dataset) == []


def test_consistent_lies_are_known_not_to_be_found(dataset: Path) -> None:
    """What the docstring of `verify` says it cannot find; if it can one day, the docstring is wrong."""
    samples = take_apart(dataset)
    patient = samples[0].row["patient"]
    for sample in samples:
        if sample.row["patient"] == patient:
            sample.say(patient="p9999999", study="s0")
    sample.row["label.class"] = 1 - sample.row["label.class"]
    sample.record["labels"]["class"] = ("cat", "dog")[sample.row["label.class"]]
    sample.record["about"] = {"Rows": 1}
    sample.say(instance="i0")
    put_together(dataset, samples)
    rows = read_rows(dataset, "quarantine")
    rows[0]["number"] += 1000
    rows[0]["patient"] = "p0000001"
    write_rows(dataset, rows, "quarantine")
    content = read_json(dataset)
    content["statistics"]["mean"] = [0.5] * len(content["statistics"]["mean"])
    content["options"]["resize"] = 7
    write_json(dataset, content)
    rehash(dataset)
    assert verify(dataset) == []
