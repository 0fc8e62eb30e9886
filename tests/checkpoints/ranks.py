"""What each process of test_ranks.py does: `python ranks.py SCENARIOS FOLDER`, with the variables of torchrun."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from medpretrain.checkpoints import (
    CheckpointError,
    CheckpointInfo,
    FolderTarget,
    Part,
    Saver,
    aside_later,
    load,
    newest,
    verify,
)
from medpretrain.training.process import joined

SHAPES = {"method.large": (300, 401), "method.bias": (7,), "method.place": (), "optimizer.large.exp_avg": (300, 401)}
HOW = ("copied", "rows", "flat")


def tensors(step):
    """The same on every process."""
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def parts(values, how, rank, world):
    """copied: as DDP has them; rows: as FSDP2, by the first dimension; flat: as ZeRO, ranges of all tensors in one."""
    made, place = [], 0
    total = sum(value.numel() for value in values.values())
    for name, value in values.items():
        count = value.numel()
        if how == "copied" or not value.ndim:
            made.append(Part(name, tuple(value.shape), value))
            place += count if how == "flat" else 0
            continue
        if how == "rows":
            row, chunk = count // len(value), -(-len(value) // world)  # the last may have nothing
            first, last = (min(len(value), chunk * each) * row for each in (rank, rank + 1))
        else:
            mine = [total * each // world - place for each in (rank, rank + 1)]
            first, last = (min(max(each, 0), count) for each in mine)
            place += count
            if first == last:
                continue  # not even its name
        made.append(Part(name, tuple(value.shape), value.reshape(-1)[first:last].clone(), first, copied=False))
    return made


def saver(folder, process, **how):
    about = CheckpointInfo("r", "a", ("b",), process.world)
    return Saver(FolderTarget(folder), about, process, **{"keep": 9} | how)


def save_in_every_way(folder, process):
    """While the default group is in use too, and the values change as soon as `save` has returned."""
    writing = saver(folder, process)
    for step, how in enumerate(HOW, 1):
        mine = parts(tensors(step), how, process.rank, process.world)
        writing.save(step, mine, {"how": how})
        for part in mine:
            part.values.fill_(-1)
        busy = torch.ones(1000)
        for _ in range(20):
            dist.all_reduce(busy)
            busy /= process.world
        assert busy.eq(1).all()
    found = writing.wait()
    assert (found.step, found.info.extra) == (len(HOW), {"how": HOW[-1]})
    assert [outcome.error for outcome in writing.outcomes()] == [None] * len(HOW)
    writing.close()


def load_in_every_way(folder, process):
    target = FolderTarget(folder)
    for step in range(1, len(HOW) + 1):
        found = verify(target, f"step-{step:08d}", process)
        for how in HOW:
            expected = parts(tensors(step), how, process.rank, process.world)
            filled = parts({name: value * 0 for name, value in tensors(step).items()}, how, process.rank, process.world)
            load(found, filled, process)
            for one, other in zip(filled, expected, strict=True):
                assert torch.equal(one.values, other.values), (step, how, one.name)


def errors_reach_every_process(folder, process):
    rank, last = process.rank, process.world - 1
    mine = parts(tensors(1), "rows", rank, process.world)
    writing = saver(folder, process)
    writing.save(1, mine, {})
    first = writing.wait()

    real = FolderTarget.create

    def full(self, draft, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == last:
        FolderTarget.create = full
    writing.save(2, mine, {})
    assert writing.wait() == first
    FolderTarget.create = real

    FolderTarget.commit, commit = full, FolderTarget.commit  # rank 0's alone
    writing.save(3, mine, {})
    assert writing.wait() == first
    FolderTarget.commit = commit
    assert [outcome.error and "No space left" in outcome.error for outcome in writing.outcomes()] == [None, True, True]

    hole = mine if rank == last else [part for part in mine if part.name != "method.large"]
    writing.save(4, hole, {})
    with pytest.raises(AssertionError, match=r"method\.large: nobody has elements 0 to"):
        writing.wait()

    writing.save(5, mine, {})
    fifth = writing.wait()
    dist.barrier()
    assert sorted(name for name in os.listdir(folder) if name != ".writer") == ["step-00000001", "step-00000005"]

    strange = [*mine, Part("method.more", (), torch.tensor(1.0))] if rank == last else mine
    refused(lambda: load(fifth, strange, process), "it lacks method.more")
    refused(lambda: load(fifth, [part for part in mine if part.name != "method.bias"], process), "takes method.bias")
    narrow = [Part(part.name, part.shape, part.values.half(), part.start, part.copied) for part in mine]
    refused(lambda: load(fifth, mine if rank else narrow, process), "is F32 .* there and F16")

    if process.leads:
        file = Path(folder) / "step-00000005" / f"rank-{last:05d}-of-{process.world:05d}.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    dist.barrier()
    refused(lambda: verify(FolderTarget(folder), "step-00000005", process), "SHA-256")
    assert newest(FolderTarget(folder), process, aside=True) == first
    dist.barrier()
    assert os.listdir(Path(folder) / "aside") == ["step-00000005-1"]
    writing.save(9, mine, {})
    writing.wait()
    assert [Path(place).name for place in aside_later(FolderTarget(folder), 1, process)] == ["step-00000009-1"]
    assert newest(FolderTarget(folder), process) == first
    writing.close()


def refused(work, message):
    with pytest.raises(CheckpointError, match=message):
        work()


def a_process_is_lost(folder, process):
    """The last one dies while it writes; the others learn of it, and nothing of the save is left."""
    writing = saver(folder, process)
    mine = parts(tensors(1), "rows", process.rank, process.world)
    writing.save(1, mine, {})
    writing.wait()
    if process.rank == process.world - 1:
        FolderTarget.create = lambda *_: os._exit(0)
    start = time.monotonic()
    writing.save(2, mine, {})
    assert writing.wait().step == 1
    assert time.monotonic() - start < 30
    assert "another process of the run is lost" in writing.outcomes()[-1].error
    if process.leads:
        assert sorted(name for name in os.listdir(folder) if name != ".writer") == ["step-00000001"]
    os._exit(0)  # the default group cannot be left in good order


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu") as process:
        for scenario in sys.argv[1].split(","):
            globals()[scenario](Path(sys.argv[2]) / scenario.split("_")[-1], process)
