"""Kill a preparation at a random moment, give the same command again until it ends, and compare every byte.

    python benchmarks/kills.py [--kills 50] [--seed N] [--out benchmarks/results]

Each trial kills the whole process group with SIGKILL: half of the time at a moment drawn evenly over the duration of an
undisturbed run, from its first file on; else at a stage drawn first (plan, shards, finish, commit), so that the short
ones are hit too, and a moment drawn after its begin. In some the run that goes on is killed too. What there is in the
end, OUT and OUT.private, must be that of the undisturbed run, but for the audit log, which tells the time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from data_prep.synthetic import make_demo_images

ROOT = Path(__file__).resolve().parents[1]
LONG = {"plan, or after the end": 0.2, "shards": 0.5, "finish": 0.1, "commit": 0.004}  # seconds, about
HOW = {
    "1 worker": ["--workers", "1"],
    "2 workers": ["--workers", "2"],
    "1 worker, --drop-duplicates exact": ["--workers", "1", "--drop-duplicates", "exact"],
    "2 workers, --overwrite": ["--workers", "2", "--overwrite"],
}


def make_source(folder: Path, count: int) -> None:
    """Made-up images, every eighth there twice."""
    made = folder / "made"
    make_demo_images(made, per_class=-(-count // 10), seed=0)
    source = folder / "source"
    for number, file in enumerate(sorted((made / "images").rglob("*.*"))):
        place = source / file.relative_to(made / "images").parent
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / file.name)
        if number % 8 == 0:
            Image.open(file).save(place / f"again_{number}.png")
    shutil.rmtree(made)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def start(source: Path, out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medpretrain.cli", "prep", "images", str(source), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (out.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--shard-size", "16", *options], stdout=log, stderr=log, env=environment, start_new_session=True
        )


def begun(process: subprocess.Popen[bytes], state: Path) -> float:
    """The moment of the first file: what comes before is Python's own."""
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    return time.monotonic()


def stage(state: Path, private: Path) -> str:
    """What a run is at, or was when it was killed."""
    if (private / "pending").exists():
        return "commit"
    if not (state / "plan.json").exists():
        return "plan, or after the end"
    if (state / "landed").exists():
        return "commit"
    return "finish" if (state / "duplicates.json").exists() else "shards"


def trial(source: Path, folder: Path, options: list[str], duration: float, old: Path, draw: random.Random) -> list[str]:
    """Kill and give again; the stages of the kills."""
    out = folder / "out"
    state, private = folder / ".out.partial", folder / "out.private"
    stages = []
    if "--overwrite" in options:
        shutil.copytree(old, out)
        shutil.copytree(old.with_name(old.name + ".private"), private)
    kills = draw.choice((1, 1, 2, 3))
    while True:
        process = start(source, out, options)
        if len(stages) < kills:
            aim = draw.choice((None, None, None, None, *LONG))
            moment = begun(process, state) + draw.random() * duration
            if aim is not None:
                while process.poll() is None and stage(state, private) != aim:
                    time.sleep(0.0005)
                moment = time.monotonic() + draw.random() * LONG[aim]
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.0005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                stages.append(stage(state, private))
                continue
        code = process.wait(timeout=300)
        log = (folder / "log").read_text()
        # A kill between the last rename and the end leaves all as it should be.
        assert code == 0 or "is a prepared dataset already" in log, log[-2000:]
        return stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="trials, each with at least one kill")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    print(f"--seed {given.seed}", flush=True)
    draw = random.Random(given.seed)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        make_source(folder, given.images)
        old = folder / "old"
        assert start(folder / "source", old, ["--seed", "1"]).wait() == 0
        wanted, durations = {}, {}
        for name, options in HOW.items():
            (folder / "whole").mkdir()
            process = start(folder / "source", folder / "whole" / "out", options)
            first = begun(process, folder / "whole" / ".out.partial")
            assert process.wait() == 0, (folder / "whole" / "log").read_text()
            durations[name] = time.monotonic() - first
            wanted[name] = contents(folder / "whole")
            shutil.rmtree(folder / "whole")
        for number in range(given.kills):
            name = list(HOW)[number % len(HOW)]
            place = folder / "trial"
            place.mkdir()
            stages: list[str] = []
            while not stages:  # where the run was faster than the moment drawn, nothing was killed
                shutil.rmtree(place)
                place.mkdir()
                stages = trial(folder / "source", place, HOW[name], durations[name], old, draw)
            (place / "log").unlink()
            there = contents(place)
            wanted[name].pop("log", None)
            same = there == wanted[name]
            rows.append({"how": name, "killed in": stages, "same bytes": same})
            print(number + 1, name, stages, "same" if same else "DIFFERENT", flush=True)
            shutil.rmtree(place)
    write(given, rows, durations)
    return int(not all(row["same bytes"] for row in rows))


def write(given: argparse.Namespace, rows: list[dict[str, object]], durations: dict[str, float]) -> None:
    machine = f"{os.cpu_count()} cores {cpu()}, Python {platform.python_version()}"
    date = str(datetime.date.today())
    stages: Counter[str] = Counter()
    for row in rows:
        stages.update(row["killed in"])  # type: ignore[arg-type]
    good = sum(bool(row["same bytes"]) for row in rows)
    said = {"seed": given.seed, "machine": machine, "date": date, "durations": durations, "trials": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kills.json").write_text(json.dumps(said, indent=1) + "\n")
    lines = [
        f"# {len(rows)} preparations killed at random moments",
        "",
        f"`python benchmarks/kills.py --kills {len(rows)} --images {given.images} --seed {given.seed}`, {date}, "
        f"{machine}; an undisturbed run takes {statistics.median(durations.values()):.1f} s.",
        "",
        f"{good} of {len(rows)} ended in the bytes of an undisturbed run, after {sum(stages.values())} kills:",
        "",
        "| killed while at | kills |",
        "| --- | ---: |",
        *(f"| {name} | {count} |" for name, count in stages.most_common()),
    ]
    (given.out / "kills.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return " ".join(names[0].partition(": ")[2].split()[:2]) if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
