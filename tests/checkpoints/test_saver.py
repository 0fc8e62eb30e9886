"""A save is whole or it is not there, whatever the disk does."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import UserError
from medpretrain.checkpoints import FolderTarget, Part, Saver, load, newest, read, verify
from medpretrain.checkpoints import folder_target as folder_module
from medpretrain.checkpoints import staging as staging_module
from medpretrain.checkpoints.manifest import check_plain

from .conftest import ABOUT, ALONE, One, bits, blank, parts, tensors


def names(target):
    return sorted(name for name in os.listdir(target.folder) if name != ".writer")


def test_a_round_trip_is_identical_to_the_bit_in_any_memory_layout(one):
    found = one.save(1234, seed=5, extra={"dataset": {"bit_depth": 12}, "none": None}, metric=0.25)
    assert str(found) == str(one.target.folder / "step-00001234")
    assert found == newest(one.target) == verify(one.target, "step-00001234")
    extra = {"dataset": {"bit_depth": 12}, "none": None}
    assert found.info == dataclasses.replace(ABOUT, step=1234, extra=extra, metric=0.25)
    saved = tensors(5)
    filled = blank(saved)
    load(found, parts(filled))
    assert bits(filled) == bits(saved)
    assert [value.stride() for value in filled.values()] == [value.stride() for value in saved.values()]
    assert bits(read(found, "optimizer.")) == bits({"step": saved["optimizer.step"], "mask": saved["optimizer.mask"]})


def test_a_file_is_plain_safetensors_that_others_open(one):
    found = one.save(1, seed=7)
    assert bits(load_file(one.target.folder / found.name / "rank-00000-of-00001.safetensors")) == bits(tensors(7))


def test_tensors_larger_than_a_chunk_come_back(one, monkeypatch):
    monkeypatch.setattr(staging_module, "_CHUNK", 64)
    monkeypatch.setattr("medpretrain.checkpoints.reading._BLOCK", 48)
    found = one.save(1, seed=7)
    assert bits(read(found)) == bits(tensors(7))


def test_no_read_is_larger_than_a_block(one, monkeypatch):
    monkeypatch.setattr("medpretrain.checkpoints.reading._BLOCK", 64)
    found, sizes = one.save(1), []
    real = folder_module._FileReader.read

    def watched(self, start, into):
        sizes.append(len(into))
        real(self, start, into)

    monkeypatch.setattr(folder_module._FileReader, "read", watched)
    assert bits(read(found)) == bits(tensors(1))
    assert max(sizes) == 64


def test_what_changes_after_save_returned_is_not_in_it(tmp_path, monkeypatch):
    """The thread writes while training goes on; the next save waits for it, and uses its memory again."""
    may_write, real = threading.Event(), FolderTarget.create

    def held(self, draft, file):
        assert may_write.wait(20)
        return real(self, draft, file)

    monkeypatch.setattr(FolderTarget, "create", held)
    target = FolderTarget(tmp_path / "checkpoints")
    saver = Saver(target, ABOUT, ALONE, keep=5)
    values = {"a": torch.full((5000,), 1.0), "b": torch.ones(3, 4).t()}
    saver.save(1, parts(values), {})
    assert saver.outcomes() == []
    assert target.names() == []
    for value in values.values():
        value.fill_(2.0)
    threading.Timer(0.2, may_write.set).start()
    saver.save(2, parts(values), {})
    for value in values.values():
        value.fill_(3.0)
    last = saver.wait()
    saver.close()
    first, second = saver.outcomes()
    assert (first.step, second.step, second.found) == (1, 2, last)
    assert second.waited_s > 0.05
    assert first.bytes == sum(path.stat().st_size for path in (target.folder / "step-00000001").iterdir())
    for outcome, value in ((first, 1.0), (second, 2.0)):
        assert {name: set(found.flatten().tolist()) for name, found in read(outcome.found).items()} == {
            "a": {value},
            "b": {value},
        }


def test_the_oldest_go_once_the_new_one_is_there(one):
    for step in (5, 10, 15, 100):
        one.save(step, keep=2)
    assert names(one.target) == ["step-00000015", "step-00000100"]
    one.save(200, keep=4)
    assert len(names(one.target)) == 3
    one.save(300, keep=1)
    assert names(one.target) == ["step-00000300"]


def test_the_best_and_every_so_manyth_stay(one):
    metrics = {10: 5.0, 20: 1.0, 30: 1.0, 40: float("nan"), 50: 2.0, 60: None, 70: 3.0, 80: 4.0}
    for step, metric in metrics.items():
        one.save(step, metric=metric, keep=2, keep_every=40, keep_best=True)
    assert [int(name[5:]) for name in names(one.target)] == [30, 40, 70, 80]
    one.save(90, metric=0.5, keep=1, keep_best=True)
    assert [int(name[5:]) for name in names(one.target)] == [90]


def test_a_damaged_checkpoint_neither_counts_nor_goes(one):
    for step in (1, 2, 3):
        one.save(step)
    (one.target.folder / "step-00000003" / "rank-00000-of-00001.safetensors").write_bytes(b"cut")
    one.save(4, keep=2)
    assert names(one.target) == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_save_after_a_rollback_is_not_taken_for_the_oldest(one):
    one.save(50, keep=1)
    one.save(10, keep=1)
    assert names(one.target) == ["step-00000010", "step-00000050"]


def test_a_step_saved_again_is_replaced(one):
    one.save(7, seed=1)
    found = one.save(7, seed=2, about=dataclasses.replace(ABOUT, recipe="other"))
    assert bits(read(found)) == bits(tensors(2))
    assert newest(one.target).info.recipe == "other"
    assert names(one.target) == ["step-00000007"]


def test_a_save_killed_between_two_renames_leaves_the_earlier_one(one):
    path = one.target.folder / one.save(7, seed=1).name
    old = path.with_name("step-00000007.old")
    path.rename(old)
    found = newest(one.target)
    assert (found.name, found.step) == (old.name, 7)
    assert bits(read(found)) == bits(tensors(1))
    one.save(7, seed=2)
    assert names(one.target) == ["step-00000007"]
    shutil.copytree(path, old)  # killed a moment later: both are there
    assert newest(one.target).name == path.name
    one.save(7, seed=3)
    assert names(one.target) == ["step-00000007"]


def test_leftovers_of_killed_saves_go_at_the_next_save_but_not_those_in_use(one, tmp_path):
    leftover = one.target.folder / ".tmp-step-00000001-dead"
    leftover.mkdir(parents=True)
    (leftover / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    assert newest(one.target) is None
    draft = one.target.begin(3, 10, 1)  # another process writes
    assert not leftover.exists()
    with pytest.raises(OSError, match="another process is writing a checkpoint in"):
        one.save(2)
    assert (one.target.folder / draft.prefix).is_dir()
    one.target.end(draft)
    one.save(2)
    assert names(one.target) == ["step-00000002"]


@pytest.mark.parametrize(
    ("extra", "where"),
    [({"x": object()}, "'x'"), ({"x": [{1: 2}]}, r"'x'\]\[0"), ({"x": (1,)}, "'x'"), ({"x": float("nan")}, "nan")],
)
def test_what_json_would_change_is_refused_before_anything_is_written(one, extra, where):
    with pytest.raises(TypeError, match=rf"extra.*{where}"):
        one.save(1, extra=extra)
    assert not one.target.folder.exists()
    check_plain({"a": [1, 2.5, None, True, {"b": "c"}]}, "extra")


def test_a_dtype_that_safetensors_does_not_have_is_refused():
    with pytest.raises(TypeError, match=r"^x is of torch.complex128"):
        Part("x", (1,), torch.zeros(1, dtype=torch.complex128))


def test_to_keep_none_is_refused(one):
    with pytest.raises(UserError, match="at least one"):
        one.save(1, keep=0)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        ([("w", 0, 3), ("w", 5, 10)], "w: nobody has elements 3 to 4"),
        ([("w", 0, 6), ("w", 5, 10)], "w: two have elements 5 to 5"),
        ([("w", 0, 9)], "w: nobody has elements 9 to 9"),
        ([("w", 0, 0)], "w: nobody has elements 0 to 9"),
    ],
)
def test_a_checkpoint_with_a_hole_is_never_committed(one, made, fault):
    holes = [Part(name, (10,), torch.zeros(stop - start), start, copied=False) for name, start, stop in made]
    saver = Saver(one.target, ABOUT, ALONE, keep=1)
    saver.save(1, holes, {})
    with pytest.raises(AssertionError, match=fault):
        saver.wait()
    saver.save(2, parts(tensors()), {})  # it was told once
    assert saver.wait().step == 2
    saver.close()
    assert names(one.target) == ["step-00000002"]


def test_too_little_room_is_said_before_anything_is_written(one, monkeypatch):
    one.save(1)
    real = os.statvfs(one.target.folder)

    def disk(**changed):
        fields = {key: getattr(real, key) for key in ("f_bavail", "f_frsize", "f_files", "f_favail")} | changed
        return lambda path: type("Disk", (), fields)

    for changed, said in (({"f_bavail": 7}, r"GB free and 0\.00 GB are needed"), ({"f_favail": 1}, "1 inodes free")):
        with monkeypatch.context() as patch:
            patch.setattr(folder_module.os, "statvfs", disk(**changed))
            patch.setattr(FolderTarget, "create", None)  # not even tried
            with pytest.raises(OSError, match=said):
                one.save(2)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "statvfs", disk(f_files=0, f_favail=0))  # as btrfs has it
        one.save(3)
    assert names(one.target) == ["step-00000001", "step-00000003"]


def test_a_file_that_cannot_grow_leaves_the_committed_ones_alone_and_the_run_goes_on(tmp_path, caplog):
    """A real failing write, as on a full disk: no file may pass 64 kB."""
    target = FolderTarget(tmp_path / "checkpoints")
    saver = Saver(target, ABOUT, ALONE, keep=1)
    saver.save(1, parts(tensors(1)), {})
    first = saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        saver.save(2, parts({"x": torch.zeros(100_000)}), {})
        assert saver.wait() == first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(target) == ["step-00000001"]
    assert "step 2 could not be saved" in caplog.text
    saver.save(3, parts({"x": torch.zeros(100_000)}), {})
    assert saver.wait().step == 3
    assert [outcome.error is None for outcome in saver.outcomes()] == [True, False, True]
    saver.close()


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_an_error_of_the_disk_at_any_call_loses_nothing(tmp_path, monkeypatch, call):
    for failing in range(1, 12):
        one = One(tmp_path / f"{failing}", keep=1)
        one.save(1, seed=1)
        real, calls = getattr(os, call), 0

        def broken(*args, real=real, failing=failing, **kwargs):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, broken)
        raised = False
        try:
            one.save(1, seed=2)
        except OSError as error:
            raised = "No space left" in str(error)
        monkeypatch.setattr(os, call, real)
        found = newest(one.target)
        assert found is not None
        kept = bits(read(found))
        assert kept in (bits(tensors(1)), bits(tensors(2)))
        assert raised or kept == bits(tensors(2))
        one.save(2, seed=3)
        assert names(one.target) == ["step-00000002"]
        if calls < failing:
            break
    else:
        raise AssertionError("no save ran through")


def test_host_memory_that_is_not_there_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    saver, values = Saver(FolderTarget(tmp_path / "checkpoints"), ABOUT, ALONE, keep=1), parts(tensors(1))
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        patch.setattr(staging_module.torch, "empty", full)
        saver.save(1, values, {})
        assert saver.wait() is None
    saver.save(2, parts(tensors(2)), {})
    assert bits(read(saver.wait())) == bits(tensors(2))
    saver.close()
    assert "no host memory" in saver.outcomes()[0].error


KILLED_IN_SAVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from medpretrain.checkpoints import CheckpointInfo, FolderTarget, Part, Saver, read, verify
from medpretrain.training.process import Process

target, pick = FolderTarget(Path(sys.argv[1]) / "checkpoints"), random.Random(int(sys.argv[2]))
alone = Process(0, 1, 0, 1, torch.device("cpu"))
step, leftovers, visible = 1, 0, []
for kill in range(30):
    delay = pick.uniform(0.01, 0.08)
    child = os.fork()
    if child == 0:
        saver = Saver(target, CheckpointInfo("r", "a", ("b",), 1), alone, keep=2, background=kill % 2 == 0)
        while True:  # each step twice: the second save replaces the first
            for _ in range(2):
                saver.save(step, [Part("x", (60_000,), torch.full((60_000,), float(step)))], {"step": step})
            step += 1
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    visible = target.names()
    for name in visible:
        found = verify(target, name)
        assert set(read(found)["x"].tolist()) == {float(found.step)} == {float(found.info.extra["step"])}
        step = max(step, found.step)
    assert visible or step == 1, "everything is lost"
    hidden = os.listdir(target.folder) if visible else []
    leftovers += any(name.startswith(".tmp-") for name in hidden)
print("reached step", step, "killed inside a save", leftovers)
assert visible and leftovers > 3  # how far it came is a matter of the machine
"""


def test_whatever_is_visible_after_a_sigkill_verifies(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN_SAVES, str(tmp_path), str(seed)],
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.wait(timeout=90) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
