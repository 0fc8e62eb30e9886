"""What webdataset and DALI make of a shard reaches `prep verify`, and so does their crash or absence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import verify_readers
from data_prep.images import prepare
from data_prep.verify import verify
from data_prep.verify_readers import ReaderFailed, read_shard

READY = "import json, os, signal, sys, time; print('ready', flush=True); request = json.loads(input()); "


@pytest.fixture
def dataset(tree: Path, tmp_path: Path) -> Path:
    prepare(tree, tmp_path / "out", shard_size=9, labels=None)
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    verify_readers.close()


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let a program answer for DALI, and nobody for webdataset."""
    monkeypatch.setattr(verify_readers, "installed", lambda reader: reader == "dali")
    monkeypatch.setattr(verify_readers, "command", lambda reader: [sys.executable, "-c", program])


def test_a_crash_is_a_problem_of_each_shard_and_verify_goes_on(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, READY + "os.kill(os.getpid(), signal.SIGSEGV)")
    found = verify(dataset)
    assert [str(problem) for problem in found] == [
        f"shards/train-0000{number}.tar: cannot be read by DALI: it crashed with signal 11" for number in range(3)
    ]


def test_an_error_a_hang_and_a_wrong_answer_are_problems(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, message in (
        ("raise ValueError('broken')", "cannot be read by DALI: it ended with code 1"),
        ("time.sleep(60)", "cannot be read by DALI: it gave no answer in 1 s"),
        ("print(json.dumps([]), flush=True); input()", "DALI reads 0 samples of 9"),
        ("print(json.dumps([['a.png', '', '']] * 9), flush=True); input()", "DALI reads something else than"),
    ):
        stand_in(monkeypatch, READY + program)
        monkeypatch.setattr(verify_readers, "READ_LIMIT", 1 if "sleep" in program else 60)
        found = verify(dataset)
        assert message in str(found[0]), program


def test_what_is_not_installed_or_not_loaded_is_said(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_readers, "_MODULES", {"webdataset": "no_webdataset", "dali": "no_nvidia.dali"})
    found = verify(dataset)
    assert found == []
    assert found.notes == ["not tried: webdataset is not installed", "not tried: DALI is not installed"]
    stand_in(monkeypatch, "import no_cuda")
    found = verify(dataset)
    assert found == []
    assert found.notes[1:] == ["not tried: DALI is installed and cannot be loaded: it ended with code 1"]


@pytest.mark.parametrize("reader", ["webdataset", "dali"])
def test_the_libraries_give_names_and_bytes_and_fail_on_a_broken_shard(dataset: Path, reader: str) -> None:
    if not verify_readers.installed(reader):
        pytest.skip(f"{reader} is not installed")
    tar = dataset / "shards" / "train-00000.tar"
    idx = tar.with_suffix(".idx")
    read = read_shard(reader, tar, idx)
    assert [name.partition(".")[0] for name, _, _ in read] == [f"{number:09d}" for number in range(9)]
    data = tar.read_bytes()
    tar.write_bytes(data[:700])
    with pytest.raises(ReaderFailed):
        read_shard(reader, tar, idx)
    tar.write_bytes(data)
    assert read_shard(reader, tar, idx) == read  # in a new process
    child = verify_readers._children[reader]._process
    verify_readers.close()
    assert child.poll() is not None
