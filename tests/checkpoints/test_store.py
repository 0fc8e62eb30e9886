"""Checkpoints in an object store: fsspec's memory, and a real S3 API on loopback."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import boto3
import fsspec
import pytest
import torch
from safetensors.torch import load as load_bytes

from data_prep.errors import UserError, WorkFailed
from medpretrain.checkpoints import (
    CheckpointError,
    FolderTarget,
    Part,
    Saver,
    StoreTarget,
    aside_later,
    at,
    load,
    newest,
    open_target,
    read,
    verify,
)
from tests.s3 import Server, serving

from .conftest import ABOUT, ALONE, One, bits, blank, parts, tensors


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(params=["memory", "s3"])
def url(request) -> str:
    bucket = f"b{secrets.token_hex(6)}"
    if request.param == "s3":
        request.getfixturevalue("server")
        boto3.client("s3").create_bucket(Bucket=bucket)
    return f"{request.param}://{bucket}/run"


def files(url):
    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return {name.removeprefix(path).lstrip("/"): system.cat_file(name) for name in system.find(path)}


def put(url, name, data):
    system, path = fsspec.core.url_to_fs(url)
    system.pipe_file(f"{path}/{name}", data)


def remove(url, name):
    system, path = fsspec.core.url_to_fs(url)
    system.rm_file(f"{path}/{name}")


def data_file(url, name):
    (found,) = [file for file in files(url) if file.startswith(name) and file.endswith(".safetensors")]
    return found


def test_a_round_trip_is_identical_to_the_bit(url, tmp_path):
    target = open_target(f"{url}/", tmp_path)
    assert newest(target) is None
    saver = Saver(target, ABOUT, ALONE, keep=2)
    for step in (1, 2, 3):
        saver.save(step, parts(tensors(step)), {"step": step})
    found = saver.wait()
    saver.close()
    assert str(found) == f"{url}/step-00000003"
    assert found == newest(target) == at(str(found))
    filled = blank(tensors(3))
    load(found, parts(filled))
    assert bits(filled) == bits(tensors(3))
    assert bits(read(at(f"{url}/step-00000002"))) == bits(tensors(2))
    assert target.names() == ["step-00000003", "step-00000002"]
    assert len(files(url)) == 4
    assert bits(load_bytes(files(url)[data_file(url, "step-00000003")])) == bits(tensors(3))
    assert os.listdir(tmp_path) == []


def test_what_is_changed_cut_or_gone_is_found_and_the_one_before_taken(url, caplog):
    one = One(StoreTarget(url))
    first, second = one.save(1), one.save(2)
    name, manifest = data_file(url, "step-00000002"), "step-00000002/manifest.json"
    whole = files(url)
    data = whole[name]
    flipped = bytes([*data[:-9], data[-9] ^ 4, *data[-8:]])
    cases = [(name, flipped, "SHA-256"), (name, data[:-1], "bytes, not"), (name, None, "is missing")]
    cases += [(manifest, whole[manifest][:-3], "not JSON"), (manifest, whole["step-00000001/manifest.json"], "step 1")]
    for file, changed, said in cases:
        caplog.clear()
        remove(url, file) if changed is None else put(url, file, changed)
        with pytest.raises(CheckpointError, match=said):
            verify(one.target, "step-00000002")
        assert newest(one.target, aside=True) == first
        assert "step-00000002" in caplog.text
        put(url, file, whole[file])
    assert newest(one.target) == second
    assert files(url) == whole


def test_a_step_saved_again_is_the_old_one_until_the_manifest_is_put(url, monkeypatch):
    one = One(StoreTarget(url))
    one.save(7, seed=1)
    system = fsspec.core.url_to_fs(url)[0]
    with monkeypatch.context() as patch:

        def broken(*_, **__):
            raise PermissionError("Access Denied")

        patch.setattr(system, "pipe_file", broken)
        with pytest.raises(OSError, match=f"^{url}: Access Denied$"):
            one.save(7, seed=2)
    assert bits(read(newest(one.target))) == bits(tensors(1))
    assert len(files(url)) == 2  # what was written of the second is gone
    one.save(7, seed=3)
    assert bits(read(newest(one.target))) == bits(tensors(3))
    assert len(files(url)) == 2


def test_a_request_that_failed_here_and_was_heard_there_loses_nothing(url, monkeypatch):
    one = One(StoreTarget(url))
    system = fsspec.core.url_to_fs(url)[0]
    real = system.pipe_file

    def heard(*arguments, **named):
        real(*arguments, **named)
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(system, "pipe_file", heard)
        with pytest.raises(OSError, match="no answer"):
            one.save(7, seed=2)
    assert bits(read(newest(one.target))) == bits(tensors(2))


def test_an_upload_that_fails_is_never_a_whole_object(url, monkeypatch):
    one = One(StoreTarget(url))
    one.save(1)

    def broken(self):
        yield memoryview(bytes(9))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("medpretrain.checkpoints.staging.Staging.data", broken)
    with pytest.raises(OSError, match="Input/output error"):
        one.save(2)
    assert all(name.startswith("step-00000001") for name in files(url))


def test_leftovers_of_killed_saves_go_and_what_is_not_ours_stays(url):
    one = One(StoreTarget(url))
    one.save(1)
    kept = files(url)
    theirs = {"notes.txt": b"mine", "step-00000001/notes.txt": b"mine", "other/step-00000001/x": b"mine"}
    left = [
        "step-00000001/0123abcd-rank-00000-of-00001.safetensors",
        "step-00000009/89ab4567-rank-00003-of-00004.safetensors",
    ]
    for name in (*theirs, *left):
        put(url, name, theirs.get(name, b"half"))
    assert one.target.names() == ["step-00000001"]
    one.save(2)
    there = files(url)
    assert {name: there.pop(name) for name in theirs} == theirs
    assert {name: there.pop(name) for name in kept} == kept
    assert all(name.startswith("step-00000002") for name in there)
    put(url, "step-00000001/manifest.json", b"damaged")
    one.save(3, keep=1)
    assert files(url)[data_file(url, "step-00000001")] == kept[next(name for name in kept if "rank" in name)]


def test_later_ones_are_set_aside_without_moving_their_data(url):
    one = One(StoreTarget(url))
    for step in (1, 2):
        one.save(step)
    (place,) = aside_later(one.target, 1)
    assert newest(one.target).step == 1
    one.save(2, seed=9)  # the run comes by again
    one.save(3, keep=1)
    there = files(url)
    data = there[place.removeprefix(f"{url}/")]
    for name in [name for name in there if name.startswith("step-00000003")]:
        remove(url, name)
    put(url, "step-00000002/manifest.json", data)  # it can be had back
    assert bits(read(newest(one.target))) == bits(tensors(2))


def test_a_store_that_cannot_be_reached_has_no_damaged_checkpoints(url, monkeypatch):
    one = One(StoreTarget(url))
    one.save(1)
    system = fsspec.core.url_to_fs(url)[0]

    def away(*_, **__):
        raise ConnectionError("Could not connect\nto the endpoint")

    for call in ("find", "cat_file", "info"):
        with monkeypatch.context() as patch:
            patch.setattr(system, call, away)
            with pytest.raises(WorkFailed, match=f"^{url}: Could not connect to the endpoint$"):
                newest(one.target, aside=True)
    assert newest(one.target).step == 1


def test_large_tensors_go_up_and_come_down_in_pieces(url, monkeypatch):
    monkeypatch.setattr("medpretrain.checkpoints.reading._BLOCK", 1 << 20)
    one = One(StoreTarget(url))
    value = torch.arange(3_000_000)
    saver = Saver(one.target, ABOUT, ALONE, keep=1)
    saver.save(1, [Part("x", (3_000_000,), value)], {})
    found = saver.wait()
    saver.close()
    assert torch.equal(read(found)["x"], value)
    part = Part("x", (3_000_000,), torch.zeros(500_000, dtype=torch.int64), 1_234_567, copied=False)
    load(found, [part])
    assert torch.equal(part.values, value[part.start : part.stop])


def test_what_a_user_writes_is_understood_or_refused(tmp_path):
    assert open_target(None, tmp_path) == FolderTarget(tmp_path / "checkpoints")
    assert open_target(str(tmp_path / "x"), tmp_path) == FolderTarget(tmp_path / "x")
    with pytest.raises(UserError, match="password must not stand in the URL"):
        open_target("ftp://me:hidden@host/x", tmp_path)
    with pytest.raises(UserError, match="give a local folder as a path"):
        open_target(f"file://{tmp_path}/x", tmp_path)
    with pytest.raises(UserError, match=r"^nosuch://a/b cannot be opened: "):
        newest(open_target("nosuch://a/b", tmp_path))
