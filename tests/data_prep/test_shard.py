"""Shards are plain USTAR with the index DALI's own tool would write."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest
from wds2idx import IndexCreator

from data_prep.shard import ShardError, ShardWriter, members


def write(path: Path, sizes: list[int]) -> None:
    writer = ShardWriter(path)
    for number, size in enumerate(sizes):
        writer.add(f"{number:09d}", "png" if number % 2 else "jpg", bytes([number % 251]) * size, b'{"n":%d}' % number)
    writer.close()


def test_index_is_byte_identical_to_wds2idx(tmp_path: Path, rng: random.Random) -> None:
    write(tmp_path / "a.tar", [0, 1, 511, 512, 513, *(rng.randrange(5000) for _ in range(200))])
    with IndexCreator(str(tmp_path / "a.tar"), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_tarfile_reads_the_same_members_at_the_same_offsets(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [7, 512, 4000])
    with tarfile.open(tmp_path / "a.tar") as archive:
        theirs = [(member.name, member.offset_data, member.size) for member in archive]
        assert {(m.uid, m.gid, m.mtime, m.mode, m.uname) for m in archive} == {(0, 0, 0, 0o644, "")}
    assert [tuple(member) for member in members(tmp_path / "a.tar")] == theirs


@pytest.mark.parametrize("at", [0, 100, 130, 150, 257, 340, 512 + 600])
def test_a_flip_in_a_header_or_padding_is_noticed_by_the_walk(tmp_path: Path, at: int) -> None:
    write(tmp_path / "a.tar", [10, 10])
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[at if at < 512 else 700] ^= 1
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(ShardError):
        list(members(tmp_path / "a.tar"))


@pytest.mark.parametrize("cut", [1, 512, 1024, 1025, 2000])
def test_a_cut_tar_is_noticed_by_the_walk(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "a.tar", [10, 900])
    raw = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(raw[:-cut])
    with pytest.raises(ShardError):
        list(members(tmp_path / "a.tar"))
