"""Peak memory of a preparation of 1.4 million images, but for their pixels: plan, resume and finish.

    python benchmarks/plan_memory.py [--images 1400000] [--scratch /dev/shm] [--out benchmarks/results]

Empty files stand for the images (300,000 patients, a split, classes), as a folder and as a CSV manifest. Each command
runs in a process of its own: first the plan alone (a part without shards), then, with the records of all shards
invented and sparse files for the shards, the same command again, which finds them done and finishes.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import finish, images, prepare
from data_prep.dataset import SHARDS, index_schema
from data_prep.images import Images
from data_prep.options import Options, Running
from data_prep.plan import read_plan
from data_prep.records import Records
from data_prep.shard import ShardFile
from data_prep.staging import RECORDS, Staging
from data_prep.work import ShardResult, Tally, key_of

PATIENTS, CLASSES, NOBODY = 300_000, 14, 999_999
SPLIT = {"train": 0.8, "val": 0.1, "test": 0.1}
STEPS: list[tuple[object, str, str]] = [
    (images, "open_source", "walk the folder, or read the manifest"),
    (images, "with_patient_pattern", "patients from names"),
    (prepare, "write_plan", "split, shuffle, write the plan"),
    (prepare, "_work", "look at all records"),
    (finish, "_without_duplicates", "columns for the duplicate search, and the search"),
    (finish, "_quarantine", "index and quarantine"),
    (finish, "write_dataset", "dataset.json"),
    (prepare, "finish", "link table"),
]


def name_of(number: int) -> str:
    return f"class_{number % CLASSES:02d}/{number * 7919 % PATIENTS:06d}_{number:07d}.jpg"


def make_source(folder: Path, count: int) -> None:
    for name in range(CLASSES):
        (folder / f"class_{name:02d}").mkdir(parents=True)
    for number in range(count):
        os.close(os.open(folder / name_of(number), os.O_CREAT | os.O_WRONLY))
    with (folder / "manifest.csv").open("w") as file:
        file.write("path,patient,class\n")
        for number in range(count):
            file.write(f"{name_of(number)},{number * 7919 % PATIENTS:06d},{number % CLASSES}\n")


def child(kind: str, folder: Path, out: Path, whole: bool) -> None:
    """Run a command and print the peak after each step, in MB."""
    steps: list[tuple[str, float, float]] = []
    started = time.monotonic()

    def measured(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            result = function(*arguments, **more)
            steps.append((what, peak(), time.monotonic() - started))
            return result

        return call

    steps.append(("Python and imports", peak(), 0.0))
    for owner, name, what in STEPS:
        setattr(owner, name, measured(getattr(owner, name), what))
    source = command(kind, folder)
    result = prepare.prepare(
        source, out, Options(SPLIT), Running(part=None if whole else (NOBODY, NOBODY))
    )  # a part that has no shards
    assert isinstance(result, prepare.Summary) == whole
    steps.append(("end", peak(), time.monotonic() - started))
    print(json.dumps(steps))


def command(kind: str, folder: Path) -> Images:
    if kind == "folder":
        return Images(folder / "images", patient_pattern=r"/(\d+)_")
    return Images(folder / "images" / "manifest.csv")


def peak() -> float:
    """Of this process, in MB. Not ru_maxrss, which begins with that of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def invent_records(out: Path) -> None:
    """A record and a sparse file for each shard of the plan."""
    staging = Staging(out, None, False, False)
    found = read_plan(staging.state)
    assert found is not None
    records = Records(staging.state / RECORDS, found, staging.store)
    (staging.dataset / SHARDS).mkdir()
    schema = index_schema(list(found.labels))
    random = np.random.default_rng(0)
    for number in range(len(found.jobs)):
        job = found.job(staging.state, number, 0)
        count, size = len(job.names), 20_000
        offsets = np.arange(count) * (size + 1536) + 512
        columns = {
            "key": [key_of(job.start + place) for place in range(count)],
            "shard": [job.shard] * count,
            "offset": offsets,
            "length": np.full(count, size),
            "extension": ["jpg"] * count,
            "width": np.full(count, 256),
            "height": np.full(count, 256),
            "bit_depth": np.full(count, 8),
            "channels": np.full(count, 1),
            "patient": job.patients,
            "split": [job.split] * count,
            "study": [None] * count,
            "series": [None] * count,
            "instance": [None] * count,
            "frame": [None] * count,
            "digest": [random.bytes(16) for _ in range(count)],
            "phash": random.integers(1, 2**63, count, dtype=np.uint64),
        } | {f"label.{name}": job.labels[:, place] for place, name in enumerate(found.labels)}
        rows = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        total = int(offsets[-1]) + size + 2048
        for ending in (".tar", ".idx"):
            with (staging.dataset / SHARDS / job.shard).with_suffix(ending).open("wb") as file:
                file.truncate(total)
        file_info = ShardFile(count, total, "0" * 64, "0" * 64)
        tallies = {1: Tally(1, 100, [5000], [300_000]), 3: Tally()}
        records.save(ShardResult(number, count, file_info, rows, [], tallies))


def run(kind: str, folder: Path, out: Path, whole: bool) -> list[tuple[str, float, float]]:
    arguments = ["--child", kind, "--scratch", str(folder), *(["--whole"] if whole else [])]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--out", str(out)], check=True, stdout=subprocess.PIPE, text=True
    )
    steps: list[tuple[str, float, float]] = json.loads(done.stdout.splitlines()[-1])
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_400_000)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--kinds", nargs="+", default=["folder", "manifest"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.scratch, given.out, given.whole)
        return
    found: dict[str, dict[str, list[tuple[str, float, float]]]] = {}
    folder = Path(tempfile.mkdtemp(prefix="plan_memory-", dir=given.scratch))
    try:
        make_source(folder / "images", given.images)
        for kind in given.kinds:
            if kind == "folder":
                (folder / "images" / "manifest.csv").rename(folder / "manifest.csv")
            out = folder / kind
            planned = run(kind, folder, out, whole=False)
            size = sum(file.stat().st_size for file in (folder / f".{kind}.partial").glob("plan.*"))
            invent_records(out)
            found[kind] = {"plan": planned, "finish": run(kind, folder, out, whole=True)}
            print(f"{kind}: the plan has {size:,} bytes", file=sys.stderr)
            if kind == "folder":
                (folder / "manifest.csv").rename(folder / "images" / "manifest.csv")
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder)
    machine = f"{os.cpu_count()} cores {cpu()}, Python {platform.python_version()}"
    said = {"images": given.images, "machine": machine, "date": str(datetime.date.today()), "found": found}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "plan.json").write_text(json.dumps(said, indent=1) + "\n")
    lines = [
        f"# Peak memory of a preparation of {given.images:,} images, without their pixels",
        "",
        f"`python benchmarks/plan_memory.py --images {given.images}`, {said['date']}, {machine}. {PATIENTS:,} "
        f"patients, {CLASSES} classes, three splits; the most resident memory of the process so far (VmHWM) after "
        "each step, and seconds since its start.",
    ]
    for kind, commands in found.items():
        for name, steps in commands.items():
            lines += ["", f"{kind}, {name}:", "", "| after | peak MB | s |", "| --- | ---: | ---: |"]
            lines += [f"| {what} | {megabytes:,.0f} | {seconds:.0f} |" for what, megabytes, seconds in steps]
    (given.out / "plan.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return " ".join(names[0].partition(": ")[2].split()[:2]) if names else platform.machine()


if __name__ == "__main__":
    main()
