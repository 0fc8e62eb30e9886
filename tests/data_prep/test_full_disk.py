"""A disk that is really full, at every step: one clear line, nothing half, and the same bytes once there is room."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import finish, plan, prepare, records
from data_prep.errors import WorkFailed
from data_prep.images import prepare as prepare_images
from data_prep.shard import members
from data_prep.staging import Staging

Draw = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]
ROOM = "64m"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@pytest.fixture
def noise(tmp_path: Path, draw: Draw) -> Path:
    """2.4 MB of images, three of which are there twice."""
    folder = tmp_path / "noise" / "a"
    folder.mkdir(parents=True)
    for number in range(15):
        (folder / f"{number}.png").write_bytes(draw(number % 12, "PNG", mode="I;16", size=(300, 260)))
    return folder.parent


def test_a_disk_that_is_too_small_ends_the_run_in_one_line_and_it_goes_on(
    noise: Path, tmp_path: Path, disk: Path
) -> None:
    resize(disk, "1m")
    command = [sys.executable, "-m", "medpretrain.cli", "prep", "images", str(noise), str(disk / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
    done = subprocess.run(
        [*command, "--shard-size", "2", "--workers", "2"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert f"No space left on device (the disk is mounted at {disk})" in done.stderr
    assert not (disk / "out").exists()
    shards = list((disk / ".out.partial" / "dataset").rglob("*.tar"))
    assert shards
    for shard in shards:  # each is whole
        assert list(members(shard))
    resize(disk, ROOM)
    prepare_images(noise, disk / "out", shard_size=2)
    prepare_images(noise, tmp_path / "whole", shard_size=2)
    assert contents(disk / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (plan, "_cut"),  # while plan.parquet is written
        (prepare, "save_plan"),
        (records, "asdict"),  # while a record is written
        (prepare, "finish"),
        (finish, "deduplicated"),
        (finish, "_quarantine"),
        (finish, "_write_links"),
        (Staging, "commit"),
        (Staging, "_identity_there"),  # after the last rename of the commit
    ],
)
def test_a_disk_that_is_full_at_any_step(
    noise: Path, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    prepare_images(noise, disk / "out", shard_size=4)
    old = contents(disk / "out")
    real = getattr(owner, name)

    def full(*arguments: object, **more: object) -> object:
        fill(disk)
        return real(*arguments, **more)

    failed = name != "_identity_there"
    with (
        monkeypatch.context() as patch,
        pytest.raises(WorkFailed, match=rf"\(the disk is mounted at {disk}\)") if failed else contextlib.nullcontext(),
    ):
        patch.setattr(owner, name, full)
        prepare_images(noise, disk / "out", shard_size=3, overwrite=True, drop_duplicates="exact")
    prepare_images(noise, tmp_path / "whole", shard_size=3, drop_duplicates="exact")
    new = contents(tmp_path / "whole")
    assert contents(disk / "out") == (old if failed else new)
    (disk / "filler").unlink()
    prepare_images(noise, disk / "out", shard_size=3, overwrite=True, drop_duplicates="exact")
    assert contents(disk / "out") == new
    assert contents(disk / "out.private") == contents(tmp_path / "whole.private")
    assert sorted(os.listdir(disk)) == ["out", "out.private"]
