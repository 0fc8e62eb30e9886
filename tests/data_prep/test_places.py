"""Where OUT may be: links, mount points, files in the way, folders of others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.images import prepare


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_link_stays_and_what_it_points_to_is_replaced(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "data")  # to nothing yet
    prepare(tree, out)
    prepare(tree, f"{out}/", seed=3, overwrite=True)
    prepare(tree, tmp_path / "whole", seed=3)
    assert out.is_symlink()
    assert contents(tmp_path / "disk" / "data") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "disk")) == ["data", "data.private"]


def test_a_relative_place_is_the_same_place(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(Path("tree"), "out/")
    with pytest.raises(UserError, match="prepared dataset already"):
        prepare(Path("tree"), "./tree/../out")
    with pytest.raises(UserError, match="lie inside each other"):
        prepare(Path("tree"), "tree/out")


def test_an_empty_folder_is_filled(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(tree, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private", "tree"]


def test_what_is_in_the_way_is_named_and_left(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (tmp_path / "file", "file exists and will not be overwritten"),
        (tmp_path / "file" / "out", r"cannot be written: .*/file: File exists"),
        (Path("/"), "/ is a mount point"),
        (Path("/proc"), "/proc is a mount point"),
        (tmp_path / ("x" * 300), "cannot be written: .*: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(tree, out, overwrite=True)
    (tmp_path / ".out.partial").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.partial is in the way and was not made"):
        prepare(tree, tmp_path / "out")
    (tmp_path / ".out.partial").unlink()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").write_text("mine")
    with pytest.raises(UserError, match="partial is in the way"):
        prepare(tree, tmp_path / "out")
    (tmp_path / ".out.partial" / "mine").unlink()
    (tmp_path / "out.private").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"out\.private is a link or a mount point"):
        prepare(tree, tmp_path / "out", overwrite=True)
    (tmp_path / "out.private").unlink()
    (tmp_path / "out.private").mkdir()
    (tmp_path / "out.private" / "mine").write_text("mine")
    for how in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"out\.private is in the way and was not made by medpretrain"):
            prepare(tree, tmp_path / "out", **how)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["file", "out.private", "tree"]


def test_a_mount_point_is_refused_before_any_work(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "out")], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match="out is a mount point, which cannot be renamed; give a folder inside it"):
            prepare(tree, tmp_path / "out")
        prepare(tree, tmp_path / "out" / "in")
        assert sorted(os.listdir(tmp_path / "out")) == ["in", "in.private"]
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


def test_a_state_that_was_removed_by_hand_does_no_harm(tree: Path, tmp_path: Path) -> None:
    prepare(tree, tmp_path / "out")
    pending = tmp_path / "out.private" / "pending"  # as a kill in a commit leaves it
    pending.write_text("of another dataset.json")
    with pytest.raises(UserError, match="prepared dataset already"):
        prepare(tree, tmp_path / "out")
    assert (tmp_path / "out" / "dataset.json").is_file()
