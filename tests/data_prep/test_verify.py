"""`prep verify` finds whatever was done to a dataset, and says nothing of one that is whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep import verify_readers
from data_prep.cli import app
from data_prep.dataset import canonical, checksum, file_sha256
from data_prep.errors import UserError
from data_prep.images import prepare
from data_prep.verify import verify

Draw = Callable[..., bytes]


@pytest.fixture
def dataset(tree: Path, tmp_path: Path) -> Path:
    (tree / "cat" / "bad.png").write_bytes(b"")
    prepare(tree, tmp_path / "out", shard_size=9, labels=None)
    return tmp_path / "out"


def test_every_byte_of_dataset_json_counts(dataset: Path) -> None:
    file = dataset / "dataset.json"
    original = file.read_bytes()
    for at in range(len(original)):
        file.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        assert verify(dataset, quick=True), at
    file.write_bytes(original)


def test_what_does_not_belong_and_what_cannot_be_read_is_named(dataset: Path) -> None:
    (dataset / "shards" / "train-00009.tar").write_bytes(b"")
    (dataset / "notes").mkdir()
    (dataset / "shards" / "more").symlink_to(dataset.parent)
    index = dataset / "shards" / "train-00001.idx"
    index.unlink()
    index.mkdir()
    found = verify(dataset, quick=True)
    assert [problem.file for problem in found] == [
        *("notes", "shards/more", "shards/train-00001.idx", "shards/train-00009.tar"),
        "shards/train-00001.idx",
    ]


def test_only_missing_dataset_json_is_a_problem_and_no_dataset_an_error(dataset: Path, tree: Path) -> None:
    (dataset / "dataset.json").unlink()
    assert [str(problem) for problem in verify(dataset)] == ["dataset.json: is missing"]
    with pytest.raises(UserError, match="is no prepared dataset"):
        verify(tree)


@pytest.mark.parametrize("how", [{"resize": 20}, {"trust_images": True}, {"resize": 20, "trust_images": True}, {}])
def test_images_that_are_known_by_their_bytes_are_checked_too(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(verify_readers, "installed", lambda reader: False)
    turned = Image.Exif()
    turned[0x0112] = 6
    (tree / "cat" / "turned.jpg").write_bytes(draw(90, "JPEG", mode="RGB", exif=turned))
    (tree / "cat" / "plain.bmp").write_bytes(draw(91, "BMP"))
    prepare(tree, tmp_path / "out", labels=None, **how)
    assert verify(tmp_path / "out") == []
    index = tmp_path / "out" / "index.parquet"
    rows = pq.read_table(index).to_pylist()
    for row in rows:
        row["digest"] = bytes([row["digest"][0] ^ 1]) + row["digest"][1:]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(index)), index)
    content = json.loads((tmp_path / "out" / "dataset.json").read_bytes())
    content["index_sha256"] = file_sha256(index)
    content["checksum"] = checksum(content)
    (tmp_path / "out" / "dataset.json").write_bytes(canonical(content))
    (found,) = verify(tmp_path / "out")
    assert "has other pixels" in found.message
    assert "and 25 more images" in found.message


def test_processes_find_what_one_finds(dataset: Path) -> None:
    for name in ("train-00000.tar", "train-00002.tar"):
        os.truncate(dataset / "shards" / name, 600)
    os.truncate(dataset / "quarantine.parquet", 6)
    seen: list[int] = []
    alone = verify(dataset, quick=True, on_progress=lambda now: seen.append(now.done))
    assert [problem.file for problem in alone] == [
        "quarantine.parquet",
        "shards/train-00000.tar",
        "shards/train-00002.tar",
    ]
    assert (len(seen), seen[-1]) == (3, 24)
    assert verify(dataset, quick=True, workers=2) == alone


def test_a_url_is_read_by_every_reader_shard_by_shard(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(fetched))
    system = fsspec.filesystem("memory")
    system.put(str(dataset), "/verify-test", recursive=True)
    try:
        found = verify("memory://verify-test")
        assert found == []
        assert found.notes == [
            f"not tried: {label} is not installed"
            for reader, label in verify_readers.READERS.items()
            if not verify_readers.installed(reader)
        ]
        name = "/verify-test/shards/train-00001.tar"
        system.pipe_file(name, system.cat_file(name)[:-1])
        system.rm_file("/verify-test/shards/train-00000.idx")
        system.pipe_file("/verify-test/shards/stray", b"")
        assert [problem.file for problem in verify("memory://verify-test", quick=True)] == [
            "shards/stray",
            "shards/train-00000.idx",
            "shards/train-00001.tar",
        ]
    finally:
        system.rm("/verify-test", recursive=True)
    assert not list(fetched.iterdir())


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
    quick = runner.invoke(app, ["verify", "--quick", str(dataset)])
    assert "not tried (quick): decoding" in quick.output
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
