"""What the user gives wrongly to `prep dicom`: one clear line, exit code 2, and nothing written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medpretrain import cli
from tests.data_prep.dicom.planted import plant

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A key, an export with one CT slice, and files that are wrong in one way each."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "1.dcm").write_bytes(plant(1).data)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no DICOM")
    (tmp_path / "text" / "b.txt").write_text("none either")
    keys = {"key": random.Random(1).randbytes(32), "other": random.Random(2).randbytes(32), "weak": b"a" * 40}
    for name, content in {**keys, "short": b"0123456789", "export/key": keys["key"]}.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "open").write_bytes(keys["key"])
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "names.yaml").write_text(
        "keep: [Modality, PatientName]\ndemographics: []\nburned_in: refuse\nultrasound: crop\n"
    )
    (tmp_path / "anatomy.yaml").write_text("body_part:\n  UP EXT: sholder\n")
    (tmp_path / "ct.yaml").write_text("brian: {centre: 40, width: 80}\n")
    (tmp_path / "reviewed.csv").write_text("instance\n1.2.3.4.5\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "keyed").mkdir()
    (tmp_path / "keyed" / "key").write_bytes(keys["key"])
    (tmp_path / "keyed" / "key").chmod(0o600)
    return tmp_path


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `medpretrain prep dicom` there; returns the exit code and what was printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["medpretrain", "prep", "dicom", *arguments])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        printed = capfd.readouterr()
        return int(code or 0), printed.out + printed.err

    return run


def tree(folder: Path) -> list[tuple[str, bytes]]:
    return [(str(path), path.read_bytes() if path.is_file() else b"") for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export out", "give --key-file, or make one with 'prep key FILE'"),
        ("export out --key-file gone", "gone cannot be read: No such file"),
        ("export out --key-file short", "holds 10 bytes; a key needs at least 32"),
        ("export out --key-file weak", "does not hold random bytes"),
        ("export out --key-file open", "is open to every user of this machine; run: chmod 600"),
        ("export out --key-file export/key", "the key file export/key lies in the export export; keep it elsewhere"),
        ("export keyed --key-file keyed/key", "it is no dataset and holds key"),
        ("export out --key-file key --profile names.yaml", "names.yaml, line 1: 'PatientName' cannot be kept"),
        ("export out --key-file key --profile strikt", "no de-identification profile is called 'strikt'; did you mean"),
        ("export out --key-file key --window stred", "--window 'stred': must be stored, percentile"),
        ("export out --key-file key --window fixed:ct.yaml", "ct.yaml, line 1: unknown anatomy 'brian'"),
        ("export out --key-file key --anatomy anatomy.yaml", "anatomy.yaml, line 2:"),
        ("export out --key-file key --reviewed reviewed.csv", "reviewed.csv, line 2: is no instance's pseudonym"),
        ("export out --key-file key --bits 12", "--bits must be 8 or 16, not 12"),
        ("export out --key-file key --bits 16 --format jpg", "--format jpg holds 8 bits; 16 need png"),
        ("export out --key-file key --format gif", "--format must be png or jpg"),
        ("export out --key-file key --resize 0", "--resize must be at least 1"),
        ("export out --key-file key --split train=0.5", "the parts add up to 0.5, not 1"),
        ("export out --key-file key --workers 0", "--workers must be at least 1"),
        ("gone out --key-file key", "gone does not exist"),
        ("empty out --key-file key", "empty: there are no files in it"),
        ("text out --key-file key", "none of 2 sources can be used (not_dicom 2); nothing was written"),
        ("export export/out --key-file key", "lie inside each other"),
        ("export full --key-file key", "full exists and will not be overwritten"),
        ("export out --key-file key --append", "--append: there is no dataset at"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder: Path, command: Command, arguments: str, message: str) -> None:
    if "export/key" not in arguments:
        (folder / "export" / "key").unlink()
    before = tree(folder)
    code, printed = command(*arguments.split())
    assert code == 2, printed
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert "Traceback" not in printed
    assert tree(folder) == before


def test_a_folder_that_cannot_be_read_is_named_by_its_root(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "export" / "key").unlink()
    (folder / "export" / "MUELLER").mkdir()
    before = tree(folder)
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if isinstance(path, bytes) and path.endswith(b"MUELLER"):
            raise PermissionError(13, "Permission denied", os.fsdecode(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    code, printed = command("export", "out", "--key-file", "key")
    assert code == 2
    assert "export, or a folder in it, cannot be read: Permission denied" in printed
    assert "MUELLER" not in printed
    monkeypatch.undo()
    assert tree(folder) == before


def test_a_dataset_is_added_to_with_its_own_key_and_profile_only(folder: Path, command: Command) -> None:
    (folder / "export" / "key").unlink()
    assert command("export", "out", "--key-file", "key")[0] == 0
    (folder / "export" / "2.dcm").write_bytes(plant(2).data)
    before = tree(folder)
    for more, message in (
        (("--key-file", "other", "--append"), "another key, so patients would get second names"),
        (("--key-file", "key", "--append", "--profile", "strict_demographics"), "other options: profile_sha256"),
        (("--key-file", "key", "--append", "--window", "percentile"), "other options: window"),
        (("--key-file", "key", "--append", "--overwrite"), "exclude each other"),
        (("--key-file", "key"), "is a prepared dataset already; --overwrite replaces it, --append adds to it"),
    ):
        code, printed = command("export", "out", *more)
        assert (code, message in printed) == (2, True), printed
        assert tree(folder) == before
    assert command("export", "out", "--key-file", "key", "--append")[0] == 0


def test_help_does_not_wait_for_the_decoders() -> None:
    code = "import sys, data_prep.cli; print([name for name in ('pydicom', 'gdcm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"
