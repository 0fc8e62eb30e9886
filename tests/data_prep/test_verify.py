"""`prep verify` finds whatever was done to a dataset, and says nothing of one that is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.dataset import canonical, checksum, file_sha256
from data_prep.errors import UserError
from data_prep.images import prepare
from data_prep.verify import verify


@pytest.fixture
def dataset(tree: Path, tmp_path: Path) -> Path:
    (tree / "cat" / "bad.png").write_bytes(b"")
    prepare(tree, tmp_path / "out", shard_size=9, labels=None)
    assert verify(tmp_path / "out") == []
    return tmp_path / "out"


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_every_random_flip_cut_growth_and_loss_is_found(dataset: Path, rng: random.Random) -> None:
    assert len(files(dataset)) == 9
    for turn in range(360):
        file = files(dataset)[turn % 9]
        original = file.read_bytes()
        changed = bytearray(original)
        kind = ("flip", "flip", "flip", "cut", "grow", "delete")[rng.randrange(6)]
        at = rng.randrange(len(original))
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del changed[at:]
        elif kind == "grow":
            changed[at:at] = bytes([rng.randrange(256)])
        file.write_bytes(changed)
        if kind == "delete":
            file.unlink()
        found = verify(dataset)
        assert found, (kind, file.name, at)
        assert found[0].file == str(file.relative_to(dataset)), (kind, at)
        file.write_bytes(original)
    assert verify(dataset) == []


def test_every_byte_of_dataset_json_counts(dataset: Path) -> None:
    file = dataset / "dataset.json"
    original = file.read_bytes()
    for at in range(len(original)):
        file.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        assert verify(dataset), at
    file.write_bytes(original)


def test_swapped_and_stray_files_are_found(dataset: Path) -> None:
    first, second = dataset / "shards" / "train-00000.tar", dataset / "shards" / "train-00001.tar"
    for one, two in ((first, second), (first.with_suffix(".idx"), second.with_suffix(".idx"))):
        for _ in range(2):
            spare = one.with_name("spare")
            one.rename(spare)
            two.rename(one)
            spare.rename(two)
            if _ == 0:
                assert {problem.file for problem in verify(dataset)} == {f"shards/{one.name}", f"shards/{two.name}"}
    assert verify(dataset) == []
    (dataset / "shards" / "train-00009.tar").write_bytes(b"")
    (dataset / "notes").mkdir()
    assert [problem.file for problem in verify(dataset)] == ["notes", "shards/train-00009.tar"]


def rehash(dataset: Path) -> None:
    """Make dataset.json agree with the files again, as someone who edits by hand might."""
    content = json.loads((dataset / "dataset.json").read_bytes())
    content["index_sha256"] = file_sha256(dataset / "index.parquet")
    for shard in content["shards"]:
        tar = dataset / "shards" / shard["name"]
        shard.update(bytes=tar.stat().st_size, sha256=file_sha256(tar), idx_sha256=file_sha256(tar.with_suffix(".idx")))
    content["checksum"] = checksum(content)
    (dataset / "dataset.json").write_bytes(canonical(content))


def test_structure_is_checked_even_where_the_hashes_were_made_to_match(dataset: Path) -> None:
    rehash(dataset)
    assert verify(dataset) == []
    kept = dataset.with_name("kept")
    shutil.copytree(dataset, kept)

    def damaged() -> str:
        rehash(dataset)
        found = verify(dataset)
        shutil.rmtree(dataset)
        shutil.copytree(kept, dataset)
        return str(found[0])

    table = pq.read_table(dataset / "index.parquet")
    offsets = table.column("offset").to_pylist()
    offsets[3] += 512
    position = table.schema.get_field_index("offset")
    pq.write_table(table.set_column(position, table.schema.field("offset"), [offsets]), dataset / "index.parquet")
    assert "does not match train-00000.tar at sample" in damaged()
    pq.write_table(table.slice(0, 20), dataset / "index.parquet")
    assert "rows for train-00002.tar" in damaged()
    tar = dataset / "shards" / "train-00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"width":40', b'"width":41', 1))
    assert "the JSON of sample" in damaged()
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "no proper end" in damaged()
    tar.with_suffix(".idx").write_bytes(b"v1.2 0\n")
    assert "does not describe its tar" in damaged()


def test_commands_exit_with_0_and_1_and_name_the_file(dataset: Path, tree: Path) -> None:
    runner = CliRunner()
    whole = runner.invoke(app, ["verify", str(dataset)])
    assert whole.exit_code == 0
    assert "24 images in 3 shards" in whole.output
    os.truncate(dataset / "shards" / "train-00002.idx", 10)
    broken = runner.invoke(app, ["verify", str(dataset)])
    assert broken.exit_code == 1
    assert broken.output.startswith("shards/train-00002.idx: ")
    assert len(broken.output.splitlines()) == 1
    nothing = runner.invoke(app, ["verify", str(tree)])
    assert isinstance(nothing.exception, UserError)


def test_images_and_stats_commands(tree: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = [
        "images",
        str(tree),
        str(tmp_path / "out"),
        "--patient-pattern",
        r"(\d+)_",
        "--split",
        "train=0.6,val=0.4",
    ]
    (tmp_path / "l.yaml").write_text("cat: {modality: MR}\n")
    done = runner.invoke(app, [*arguments, "--seed", "1", "--labels", str(tmp_path / "l.yaml")])
    assert done.exit_code == 0, done.output
    assert "24 images (train " in done.output
    assert "warning: 1 of 2 classes ('dog'; 8 images)" in done.output
    assert "out.private links samples to files" in done.output
    found = json.loads(runner.invoke(app, ["stats", str(tmp_path / "out"), "--json"]).output)
    assert found["images"] == 24
    assert sum(found["labels"]["class"]["dog"].values()) == 8
    assert sum(found["labels"]["modality"]["(unknown)"].values()) == 8
    assert sum(found["patients"]["by_split"].values()) == found["patients"]["known"] == 10
    assert found["height"] == {"min": 30, "median": 30, "max": 30}
    tables = runner.invoke(app, ["stats", str(tmp_path / "out")])
    assert tables.exit_code == 0
    assert "label modality" in tables.output
