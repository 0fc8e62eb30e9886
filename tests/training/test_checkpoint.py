import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from medpretrain.training import checkpoint
from medpretrain.training.checkpoint import CheckpointError, CheckpointInfo, load, newest, save, verify

ABOUT = CheckpointInfo(recipe="seed: 1\nname: ü\n", recipe_sha256="a" * 64, dataset_sha256=("b" * 64,), world_size=2)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": OrderedDict(a=torch.randn(3, 5, generator=generator), b=torch.tensor([float("nan"), -0.0])),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "rng": torch.get_rng_state(),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95), "foreach": None, "params": [0, 1]}],
        "by_index": {0: torch.tensor(3, dtype=torch.int64)},
        "flag": True,
        "name": "dino",
    }


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).tolist() if value.ndim else value
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bits(item) for item in value)
    return value


def names(run):
    return sorted(os.listdir(run / "checkpoints"))


def test_a_round_trip_is_identical_to_the_bit(tmp_path):
    path = save(tmp_path, 1234, state(), ABOUT, keep=2)
    assert path == tmp_path / "checkpoints" / "step-00001234"
    loaded, info = load(path)
    assert bits(loaded) == bits(state())
    assert info == verify(path) == dataclasses.replace(ABOUT, step=1234)
    assert newest(tmp_path) == path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT
    assert manifest["files"]["state.pt"]["bytes"] == (path / "state.pt").stat().st_size


def test_a_checkpoint_of_an_earlier_format_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = save(tmp_path, 1, state(), ABOUT, keep=1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2"):
        load(path)


def test_an_optimizer_comes_back_from_a_checkpoint(tmp_path):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, ABOUT, keep=1)
    assert bits(load(path)[0]["optimizer"]) == bits(optimizer.state_dict())


def test_the_oldest_go_once_the_new_one_is_there(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, state(step), ABOUT, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000100"]
    save(tmp_path, 200, state(), ABOUT, keep=4)
    assert len(names(tmp_path)) == 3
    save(tmp_path, 300, state(), ABOUT, keep=1)
    assert names(tmp_path) == ["step-00000300"]


def test_a_damaged_checkpoint_neither_counts_nor_goes(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), ABOUT, keep=3)
    (tmp_path / "checkpoints" / "step-00000003" / "state.pt").write_bytes(b"cut")
    save(tmp_path, 4, state(4), ABOUT, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_save_after_a_rollback_is_not_taken_for_the_oldest(tmp_path):
    save(tmp_path, 50, state(), ABOUT, keep=1)
    path = save(tmp_path, 10, state(), ABOUT, keep=1)
    assert path.exists()
    assert names(tmp_path) == ["step-00000010", "step-00000050"]


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 7, {"x": 1}, ABOUT, keep=1)
    path = save(tmp_path, 7, {"x": 2}, dataclasses.replace(ABOUT, world_size=1), keep=1)
    assert load(path)[0] == {"x": 2}
    assert names(tmp_path) == ["step-00000007"]


def test_a_save_killed_between_two_renames_leaves_the_earlier_one(tmp_path):
    path = save(tmp_path, 7, {"x": 1}, ABOUT, keep=1)
    aside = path.with_name("step-00000007.old")
    path.rename(aside)
    assert newest(tmp_path) == aside
    assert load(aside)[1].step == 7
    save(tmp_path, 7, {"x": 2}, ABOUT, keep=1)
    assert names(tmp_path) == ["step-00000007"]
    shutil.copytree(path, aside)  # killed a moment later: both are there
    assert newest(tmp_path) == path
    save(tmp_path, 7, {"x": 3}, ABOUT, keep=1)
    assert names(tmp_path) == ["step-00000007"]


def test_leftovers_of_killed_saves_go_at_the_next_save(tmp_path):
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000001-dead"
    leftover.mkdir(parents=True)
    (leftover / "state.pt").write_bytes(b"half")
    assert newest(tmp_path) is None
    save(tmp_path, 2, state(), ABOUT, keep=1)
    assert names(tmp_path) == ["step-00000002"]


def flip(good, other, pick):
    file = good / pick.choice(["state.pt", "manifest.json"])
    data = bytearray(file.read_bytes())
    data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    file.write_bytes(data)


def truncate(good, other, pick):
    file = good / pick.choice(["state.pt", "manifest.json"])
    os.truncate(file, pick.randrange(file.stat().st_size))


def lengthen(good, other, pick):
    with open(good / pick.choice(["state.pt", "manifest.json"]), "ab") as file:
        file.write(pick.randbytes(pick.randint(1, 9)))


def delete(good, other, pick):
    (good / pick.choice(["state.pt", "manifest.json"])).unlink()


def swap_files(good, other, pick):
    name = pick.choice(["state.pt", "manifest.json"])
    shutil.copy(other / name, good / name)


def swap_folders(good, other, pick):
    for name in ("state.pt", "manifest.json"):
        shutil.copy(other / name, good / name)


def add(good, other, pick):
    (good / f"extra{pick.randrange(10)}").write_bytes(b"")


def link(good, other, pick):
    target = good.parent.parent / "elsewhere"
    (good / "state.pt").rename(target)
    (good / "state.pt").symlink_to(target)


def zero_a_page(good, other, pick):
    data = bytearray((good / "state.pt").read_bytes())
    start = pick.randrange(len(data) - 64)
    while not any(data[start : start + 64]):
        start = pick.randrange(len(data) - 64)
    data[start : start + 64] = bytes(64)
    (good / "state.pt").write_bytes(data)


def test_every_fault_is_found_and_the_older_checkpoint_is_taken(tmp_path, caplog):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    pick = random.Random(seed)
    older, good = save(tmp_path, 1, state(1), ABOUT, keep=2), save(tmp_path, 2, state(2), ABOUT, keep=2)
    backup = shutil.copytree(good, tmp_path / "backup")
    faults = [truncate, lengthen, delete, swap_files, swap_folders, add, link, zero_a_page]
    for trial in range(400):
        fault = flip if trial % 2 else pick.choice(faults)
        fault(good, older, pick)
        caplog.clear()
        with pytest.raises(CheckpointError, match=r"step-00000002"):
            verify(good)
        with pytest.raises(CheckpointError):
            load(good)
        assert newest(tmp_path) == older, fault.__name__
        assert "step-00000002" in caplog.text
        assert good.exists()
        shutil.rmtree(good)
        shutil.copytree(backup, good)
    assert newest(tmp_path) == good


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1, {"x": 1}, ABOUT, keep=1)
    file = path / "manifest.json"
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x20]) + data[position + 1 :])
        with pytest.raises(CheckpointError):
            verify(path)
    file.write_bytes(data)
    verify(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "state.pt").unlink(), r"state.pt is missing"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest.json is missing"),
        (lambda p: (p / "more").mkdir(), r"more is no part"),
        (lambda p: os.truncate(p / "state.pt", 9), r"state.pt has 9 bytes"),
        (lambda p: (p / "manifest.json").write_text("[]"), r"not a JSON object"),
        (lambda p: (p / "manifest.json").write_text('{"format": 99}'), r"newer medpretrain"),
        (lambda p: shutil.rmtree(p), r"there is no checkpoint at"),
    ],
)
def test_an_error_says_which_file_and_what_is_wrong(tmp_path, change, message):
    path = save(tmp_path, 1, state(), ABOUT, keep=1)
    change(path)
    with pytest.raises(CheckpointError, match=message):
        verify(path)


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert newest(tmp_path) is None


@pytest.mark.parametrize("bad", [{"x": object()}, {"x": [{1.5: 2}]}, {"x": (len,)}])
def test_a_state_that_would_not_load_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(TypeError, match=r"state\['x'\]"):
        save(tmp_path, 1, bad, ABOUT, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_to_keep_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        save(tmp_path, 1, {}, ABOUT, keep=0)


def test_a_file_that_cannot_grow_leaves_the_committed_ones_alone(tmp_path):
    """A real failing write, as on a full disk: no file may pass 64 kB."""
    path = save(tmp_path, 1, state(), ABOUT, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved"):
            save(tmp_path, 2, {"x": torch.zeros(100_000)}, ABOUT, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path) == path


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_an_error_of_the_disk_at_any_call_loses_nothing(tmp_path, monkeypatch, call):
    for failing in range(1, 12):
        run = tmp_path / f"{failing}"
        run.mkdir()
        save(run, 1, {"x": 1}, ABOUT, keep=1)
        real, calls = getattr(os, call), 0

        def broken(*args, real=real, failing=failing, **kwargs):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(checkpoint.os, call, broken)
        raised = False
        try:
            save(run, 1, {"x": 2}, ABOUT, keep=1)
        except CheckpointError as error:
            raised = "No space left" in str(error)
        monkeypatch.setattr(checkpoint.os, call, real)
        found = newest(run)
        assert found is not None
        value = load(found)[0]["x"]
        assert value in (1, 2)
        assert raised or value == 2
        save(run, 2, {"x": 3}, ABOUT, keep=1)
        assert names(run) == ["step-00000002"]
        if calls < failing:
            break
    else:
        raise AssertionError("no save ran through")


KILLED_IN_SAVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from medpretrain.training.checkpoint import CheckpointInfo, _committed, save, verify

run, pick = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
about = CheckpointInfo("r", "a", ("b",), 1)
step, leftovers, left_aside = 1, 0, 0
for kill in range(30):
    delay = pick.uniform(0.01, 0.08)
    child = os.fork()
    if child == 0:
        while True:  # each step twice: the second save replaces the first
            for _ in range(2):
                save(run, step, {"x": torch.full((60_000,), float(step))}, about, keep=2)
            step += 1
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    visible = _committed(run / "checkpoints")
    for path in visible:
        step = max(step, verify(path).step)
    assert visible or step == 1, "everything is lost"
    names = os.listdir(run / "checkpoints") if visible else []
    leftovers += any(name.startswith(".tmp-") for name in names)
    left_aside += any(name.endswith(".old") for name in names)
print("reached step", step, "killed inside a save", leftovers, "between its renames", left_aside)
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
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
