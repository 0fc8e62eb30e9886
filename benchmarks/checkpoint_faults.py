"""Damage checkpoints at random, and see whether each damage is found and the checkpoint before is taken.

    python benchmarks/checkpoint_faults.py [--faults 600] [--seed N] [--megabytes 500] [--out benchmarks/results]

Two processes save three checkpoints. Each trial damages the newest (a fault that swaps files between two of them
damages both) and asks four things: `verify` refuses it and names it; `newest` gives the latest that is not damaged;
what is loaded from that is equal to the bit to what was saved; the damaged one is still there. Then all is put back.
Last, what hashing costs: a save of many megabytes with SHA-256 and without.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from medpretrain.checkpoints import CheckpointError, CheckpointInfo, FolderTarget, Part, Saver, load, newest, verify
from medpretrain.checkpoints.manifest import MANIFEST
from medpretrain.training.process import Process, joined

ASKED = ("found", "fallback", "identical", "kept")
WORLD, STEPS = 2, (10, 20, 30)
ABOUT = CheckpointInfo("seed: 1\n", "a" * 64, ("b" * 64,), WORLD)
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def state(step: int, seed: int) -> dict[str, Tensor]:
    """What a run might hold after `step`: large and small, several dtypes, a scalar."""
    draw = torch.Generator().manual_seed(seed * 1000 + step)
    return {
        "method.large": torch.randn(150, 500, generator=draw),
        "method.bias": torch.randn(33, generator=draw).bfloat16(),
        "method.place": torch.tensor(step),
        "method.images": torch.randn(4, 3, 5, 5, generator=draw).contiguous(memory_format=torch.channels_last),
        "optimizer.large.exp_avg": torch.randn(150, 500, generator=draw).half(),
        "optimizer.flags": torch.rand(11, generator=draw) < 0.5,
    }


def parts(tensors: dict[str, Tensor], process: Process, *, spread: bool) -> list[Part]:
    """As DDP has them, whole on each process; or with `spread` as FSDP2 has the optimizer's, in ranges."""
    made = []
    for name, values in tensors.items():
        if spread and name.startswith("optimizer."):
            flat, count = values.reshape(-1), values.numel()
            first, last = (count * rank // process.world for rank in (process.rank, process.rank + 1))
            made.append(Part(name, tuple(values.shape), flat[first:last].clone(), first, copied=False))
        else:
            made.append(Part(name, tuple(values.shape), values))
    return made


def save_all(folder: Path, seed: int, process: Process) -> None:
    saver = Saver(FolderTarget(folder), ABOUT, process, keep=len(STEPS))
    for step in STEPS:
        saver.save(step, parts(state(step, seed), process, spread=True), {"step": step})
    assert saver.wait() is not None
    saver.close()


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        found[name].contiguous().reshape(-1).view(torch.uint8).equal(values.contiguous().reshape(-1).view(torch.uint8))
        for name, values in expected.items()
    )


class Folder:
    """The checkpoints that are damaged, the same once more of another seed, and those of one process."""

    def __init__(self, scratch: Path, seed: int, run_ranks: Callable[[list[str], int], None]) -> None:
        self.seed, self.whole, self.folder = seed, scratch / "whole", scratch / "checkpoints"
        self.other_save, self.other_world = scratch / "other_save", scratch / "other_world"
        run_ranks([__file__, "--rank-into", str(scratch), "--seed", str(seed)], WORLD)
        save_all(self.other_world, seed, ALONE)
        shutil.copytree(self.whole, self.folder)

    def name(self, back: int = 0) -> str:
        return f"step-{STEPS[-1 - back]:08d}"

    def files(self, back: int = 0) -> list[Path]:
        return sorted((self.folder / self.name(back)).iterdir())

    def restore(self) -> None:
        for path in self.folder.glob("step-*"):
            shutil.rmtree(path)
        shutil.rmtree(self.folder / "aside", ignore_errors=True)
        shutil.copytree(self.whole, self.folder, dirs_exist_ok=True)


# A fault changes the newest checkpoint, and gives the names under which damaged ones stand then.
Fault = Callable[[Folder, random.Random], set[str]]


def flip_a_bit(there: Folder, draw: random.Random) -> set[str]:
    file = draw.choice(there.files())
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return {there.name()}


def zero_a_page(there: Folder, draw: random.Random) -> set[str]:
    file = draw.choice(there.files())
    data = bytearray(file.read_bytes())
    length = min(512, len(data) // 2)
    start = draw.randrange(len(data) - length)
    while not any(data[start : start + length]):
        start = draw.randrange(len(data) - length)
    data[start : start + length] = bytes(length)
    file.write_bytes(data)
    return {there.name()}


def truncate(there: Folder, draw: random.Random) -> set[str]:
    file = draw.choice(there.files())
    os.truncate(file, draw.randrange(file.stat().st_size))
    return {there.name()}


def empty(there: Folder, draw: random.Random) -> set[str]:
    os.truncate(draw.choice(there.files()), 0)
    return {there.name()}


def grow(there: Folder, draw: random.Random) -> set[str]:
    with draw.choice(there.files()).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 5000)))
    return {there.name()}


def delete(there: Folder, draw: random.Random) -> set[str]:
    draw.choice(there.files()).unlink()
    return {there.name()}


def swap_within(there: Folder, draw: random.Random) -> set[str]:
    one, other = draw.sample(there.files(), 2)
    swap(one, other)
    return {there.name()}


def swap_between(there: Folder, draw: random.Random) -> set[str]:
    back = draw.randint(1, len(STEPS) - 1)
    number = draw.randrange(WORLD + 1)
    swap(there.files()[number], there.files(back)[number])
    return {there.name(), there.name(back)}


def swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def manifest_of_another_step(there: Folder, draw: random.Random) -> set[str]:
    shutil.copy(draw.choice(there.files(draw.randint(1, len(STEPS) - 1))[:1]), there.files()[0])
    return {there.name()}


def manifest_of_another_save(there: Folder, draw: random.Random) -> set[str]:
    shutil.copy(there.other_save / there.name() / MANIFEST, there.files()[0])
    return {there.name()}


def data_of_another_save(there: Folder, draw: random.Random) -> set[str]:
    file = draw.choice(there.files()[1:])
    shutil.copy(there.other_save / there.name() / file.name, file)
    return {there.name()}


def data_of_another_world(there: Folder, draw: random.Random) -> set[str]:
    foreign = next((there.other_world / there.name()).glob("rank-*"))
    shutil.copy(foreign, draw.choice([*there.files()[1:], there.folder / there.name() / foreign.name]))
    return {there.name()}


def rename_the_folder(there: Folder, draw: random.Random) -> set[str]:
    name = f"step-{draw.randint(STEPS[-1] + 1, 10**6):08d}"
    (there.folder / there.name()).rename(there.folder / name)
    return {name}


def replace_by_an_older(there: Folder, draw: random.Random) -> set[str]:
    shutil.rmtree(there.folder / there.name())
    shutil.copytree(there.folder / there.name(draw.randint(1, len(STEPS) - 1)), there.folder / there.name())
    return {there.name()}


def link(there: Folder, draw: random.Random) -> set[str]:
    file = draw.choice(there.files()[1:])
    outside = there.folder.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    return {there.name()}


FAULTS: tuple[Fault, ...] = (
    *(flip_a_bit, zero_a_page, truncate, empty, grow, delete, swap_within, swap_between, link),
    *(manifest_of_another_step, manifest_of_another_save, data_of_another_save, data_of_another_world),
    *(rename_the_folder, replace_by_an_older),
)


def trial(there: Folder, fault: Fault, draw: random.Random) -> dict[str, object]:
    """Damage, ask, put back."""
    damaged = fault(there, draw)
    target = FolderTarget(there.folder)
    named = 0
    for name in damaged:
        try:
            verify(target, name)
        except CheckpointError as error:
            named += name in str(error)
    good = next(step for step in reversed(STEPS) if f"step-{step:08d}" not in damaged and step != STEPS[-1])
    aside = draw.random() < 0.5
    found = newest(target, aside=aside)
    taken = found is not None and found.name == f"step-{good:08d}"
    identical = False
    if found is not None:
        expected = state(good, there.seed)
        values = {name: torch.zeros_like(value) for name, value in expected.items()}
        load(found, parts(values, ALONE, spread=False))
        identical = same_bits(values, expected)
    kept = {path.name.rpartition("-")[0] for path in (there.folder / "aside").glob("*")} if aside else damaged
    above = {name for name in damaged if name > f"step-{good:08d}"}
    row = {
        "fault": fault.__name__.replace("_", " "),
        "found": named == len(damaged),
        "fallback": taken,
        "identical": identical,
        "kept": kept >= above,
    }
    there.restore()
    return row


def trials(there: Folder, count: int, draw: random.Random) -> list[dict[str, object]]:
    """Half are flipped bits: that is what loads without a word elsewhere."""
    faults = (flip_a_bit if number % 2 else FAULTS[number // 2 % len(FAULTS)] for number in range(count))
    return [trial(there, fault, draw) for fault in faults]


class _NoHash:
    """In place of hashlib.sha256, to see what it costs."""

    def __init__(self, data: bytes = b"") -> None:
        self.update = lambda data: None

    def hexdigest(self) -> str:
        return "0" * 64


def cost_of_hashing(folder: Path, megabytes: int, repeats: int) -> dict[str, object]:
    """Median seconds of a save of `megabytes` by one process, with SHA-256 and without, taking turns."""
    tensors = {f"t{number}": torch.randn(megabytes * 250_000 // 16) for number in range(16)}
    found: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    saver = Saver(FolderTarget(folder), ABOUT, ALONE, keep=1)
    for number in range(2 * repeats + 1):
        how = ("with", "without")[number % 2]
        hashed = hashlib.sha256 if how == "with" else _NoHash
        with mock.patch("medpretrain.checkpoints.staging.hashlib.sha256", hashed):
            start = time.perf_counter()
            saver.save(number, parts(tensors, ALONE, spread=False), {})
            blocked = time.perf_counter() - start
            saver.wait()
        outcome = saver.outcomes()[0]
        assert outcome.error is None, outcome.error
        if number:  # the first makes the buffers
            found[how].append(
                {"blocked_s": blocked, "total_s": outcome.total_s, "waited_for_hash_s": outcome.hashing_s}
            )
    saver.close()
    medians = {
        how: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for how, rows in found.items()
    }
    share = medians["with"]["total_s"] / medians["without"]["total_s"] - 1
    return {"megabytes": megabytes, "repeats": repeats, "median": medians, "rows": found, "hashing_adds": share}


def counted(rows: list[dict[str, object]]) -> dict[str, dict[str, int]]:
    """By fault, and of all: how many there were, and for how many each question had a yes."""
    names = Counter(str(row["fault"]) for row in rows)
    found = {}
    for name in [*sorted(names), "all"]:
        of = [row for row in rows if name in ("all", row["fault"])]
        found[name] = {"injected": len(of), **{key: sum(bool(row[key]) for row in of) for key in ASKED}}
    return found


def markdown(rows: list[dict[str, object]], cost: dict[str, object] | None, about: str) -> str:
    lines = [
        "# Faults in checkpoints",
        "",
        about,
        "",
        "| fault | injected | found | the one before taken | loaded to the bit | damaged one kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in counted(rows).items():
        lines.append(f"| {name} | {' | '.join(map(str, row.values()))} |")
    if cost is not None:
        median = cost["median"]
        assert isinstance(median, dict)
        lines += [
            "",
            f"## What hashing costs: a save of {cost['megabytes']} MB, median of {cost['repeats']}",
            "",
            "| | training stands still, s | until committed, s | the hash took longer than writing by, s |",
            "| --- | --- | --- | --- |",
        ]
        for how, row in median.items():
            lines.append(
                f"| {how} SHA-256 | {row['blocked_s']:.2f} | {row['total_s']:.2f} | {row['waited_for_hash_s']:.2f} |"
            )
        lines += [
            "",
            f"Hashing adds {cost['hashing_adds']:+.0%} to the time until the commit, in the background; training "
            f"stands still {median['with']['blocked_s'] - median['without']['blocked_s']:+.2f} s longer with it.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**20))
    parser.add_argument("--megabytes", type=int, default=500, help="of the save that is timed; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to time; the temporary folder by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_into:
        with joined("cpu") as process:
            save_all(given.rank_into / "whole", given.seed, process)
            save_all(given.rank_into / "other_save", given.seed + 1, process)
        return 0
    from exactness import run_ranks  # not in the ranks: it imports all methods

    logging.getLogger("medpretrain").setLevel(logging.ERROR)  # a warning a fault
    print(f"--seed {given.seed}", flush=True)
    draw = random.Random(given.seed)
    cost = None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=given.scratch) as scratch:
        there = Folder(Path(scratch), given.seed, run_ranks)
        rows = trials(there, given.faults, draw)
        if given.megabytes:
            cost = cost_of_hashing(Path(scratch) / "cost", given.megabytes, given.repeats)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = (
        f"`python benchmarks/checkpoint_faults.py --faults {given.faults} --seed {given.seed}`, {date}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}. "
        f"Checkpoints of {WORLD} processes, read by one."
    )
    text = markdown(rows, cost, about)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        missed = [row for row in rows if not all(row[key] for key in ASKED)]
        whole = {"about": about, "seed": given.seed, "faults": counted(rows), "missed": missed, "hashing": cost}
        (given.out / "checkpoint_faults.json").write_text(json.dumps(whole, indent=1) + "\n")
        (given.out / "checkpoint_faults.md").write_text(text)
    return 0 if all(row[key] for row in rows for key in ASKED) else 1


if __name__ == "__main__":
    sys.exit(main())
