"""Kill runs with SIGKILL, let them go on, and compare with runs that nobody disturbed.

    python benchmarks/resume.py [--methods dino ...] [--strategies ddp ...] [--seed N] [--out benchmarks/results]

Three tables. First, each method under each strategy, two processes, killed at an early step drawn by the seed and
resumed for 50 steps and more: every tensor of the last checkpoint, every row of metrics and every sample with its
augmentation, compared to the bit. Second, the number of processes goes from 2 to 1 to 4 by two kills. Third, the
strategy goes from DDP to FSDP2 to ZeRO-2 to DDP by three kills. There the sum over processes rounds otherwise, so
losses are compared with a tolerance; samples and augmentations are compared to the bit again. The files are written
after each row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jobs

STEPS, EVERY, FURTHER = 64, 3, 50
STRATEGIES = {"ddp": "strategy=ddp", "fsdp2": "strategy=fsdp2", "zero2": "strategy=deepspeed"}
SOON, TOLERANCE, TOLERANCE_SOON = 5, 0.01, 1e-4
"""Relative, of each logged loss where the world or the strategy changed, and of the first steps after the first change:
rounding grows from step to step."""


def same_world(recipe: Path, folder: Path, option: str, draw: random.Random) -> dict[str, Any]:
    """Two processes, killed once; `folder / "whole"` is the undisturbed run and is made if it is not there."""
    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    if not whole.exists():
        jobs.Job(recipe, whole, 2, option).end()
    last = jobs.Job(recipe, killed, 2, option).kill_after(killed, draw.randrange(EVERY + 1, STEPS - FURTHER - 1))
    jobs.Job(recipe, killed, 2, option).end()
    difference = jobs.difference(killed, whole, STEPS)
    resumed = jobs.starts(killed)[-1]
    return {
        "killed after": last,
        "resumed from": resumed,
        "further steps": STEPS - resumed,
        "tensors": len(jobs.state(whole, STEPS)),
        "samples": len(jobs.seen(whole, STEPS)),
        "rows measured again": len(jobs.measured_again(killed)),
        "difference": str(difference),
        "ok": not difference and resumed > 0 and STEPS - resumed >= FURTHER,
        "seconds": round(time.monotonic() - began),
    }


def changed(recipe: Path, run: Path, whole: Path, legs: list[tuple[int, str]], draw: random.Random) -> dict[str, Any]:
    """A run that is killed at the end of each leg but the last, and goes on as the next: (processes, strategy)."""
    began = time.monotonic()
    part = STEPS // len(legs)
    kills = []
    for number, (world, option) in enumerate(legs):
        job = jobs.Job(recipe, run, world, option)
        if number + 1 < len(legs):
            kills.append(job.kill_after(run, number * part + draw.randrange(part // 2, part)))
        else:
            job.end()
    ours, theirs = jobs.seen(run, STEPS), jobs.seen(whole, STEPS)
    differences = jobs.loss_differences(run, whole)
    first = jobs.starts(run)[1]
    largest, soon = max(differences), max(differences[first : first + SOON])
    row = {
        "killed after": kills,
        "resumed from": jobs.starts(run)[1:],
        "same samples and augmentations": ours.keys() == theirs.keys(),
        "epochs whole": jobs.epochs_are_whole(ours, STEPS),
        "same until the first change": not any(differences[:first]),
        "largest difference soon": soon,
        "largest difference": largest,
        "at step": 1 + differences.index(largest),
        "seconds": round(time.monotonic() - began),
    }
    asked = ("same samples and augmentations", "epochs whole", "same until the first change")
    close = largest <= TOLERANCE and soon <= TOLERANCE_SOON
    return row | {"ok": all(row[key] for key in asked) and close and len(differences) == STEPS}


WORLDS = [(2, "strategy=ddp"), (1, "strategy=ddp"), (4, "strategy=ddp")]
ACROSS = [(2, STRATEGIES[name]) for name in ("ddp", "fsdp2", "zero2", "ddp")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(jobs.CASES), choices=list(jobs.CASES))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    print(f"--seed {given.seed}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {"same": [], "worlds": [], "across": []}

    def add(table: str, row: dict[str, Any]) -> None:
        found[table].append(row)
        print(table, json.dumps(row), flush=True)
        write(given, found)

    with tempfile.TemporaryDirectory(prefix="resume-") as scratch:
        dataset = jobs.make_dataset(Path(scratch))
        for method in given.methods:
            folder = Path(scratch) / method
            folder.mkdir()
            recipe = jobs.write_recipe(folder / "recipe.yaml", method, dataset, steps=STEPS, every=EVERY, keep=STEPS)
            whole = folder / "ddp" / "whole"
            for name in given.strategies:
                (folder / name).mkdir()
                draw = random.Random(f"{given.seed} {method} {name}")
                row = same_world(recipe, folder / name, STRATEGIES[name], draw)
                add("same", {"method": method, "strategy": name, **row})
            if not whole.exists():
                whole.parent.mkdir(exist_ok=True)
                jobs.Job(recipe, whole, 2).end()
            for table, legs in (("worlds", WORLDS), ("across", ACROSS)):
                draw = random.Random(f"{given.seed} {method} {table}")
                add(table, {"method": method, **changed(recipe, folder / table, whole, legs, draw)})
            shutil.rmtree(folder)
    return int(not all(row["ok"] for rows in found.values() for row in rows))


def write(given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    about = {"seed": given.seed, "machine": jobs.machine(), "date": str(datetime.date.today())}
    constants: dict[str, Any] = {"steps": STEPS, "every": EVERY, "global_batch": jobs.BATCH}
    constants |= {"tolerance": TOLERANCE, "tolerance_soon": TOLERANCE_SOON, "soon": SOON}
    said = about | constants | found
    jobs.write_by_rename(given.out / "resume.json", json.dumps(said, indent=1) + "\n")
    jobs.write_by_rename(given.out / "resume.md", markdown(given, found))


def markdown(given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# Runs that were killed and resumed",
        "",
        f"`python benchmarks/resume.py --seed {given.seed}`, {datetime.date.today()}, {jobs.machine()}; {STEPS} steps "
        f"of {jobs.BATCH} images, a checkpoint every {EVERY}, SIGKILL to all processes.",
        "",
        "Two processes before and after: compared to the bit with an undisturbed run are all tensors of the last "
        "checkpoint (networks, teacher, queue, optimizer), all rows of metrics (loss, learning rate, gradient norm, "
        "measures of the features; also those measured before the kill and again after it), and every sample with "
        "its augmentation.",
        "",
        "| method | strategy | killed after | resumed from | further steps | tensors | samples | different |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in found["same"]:
        lines.append(
            f"| {row['method']} | {row['strategy']} | {row['killed after']} | {row['resumed from']} | "
            f"{row['further steps']} | {row['tensors']} | {row['samples']} | {row['difference']} |"
        )
    for table, title in (
        ("worlds", "Processes 2 -> 1 -> 4, DDP"),
        ("across", "DDP -> FSDP2 -> ZeRO-2 -> DDP, two processes"),
    ):
        lines += [
            "",
            f"{title}, beside an undisturbed run of two processes with DDP. Relative differences of losses, of which "
            f"at most {TOLERANCE_SOON:.0e} is allowed in the {SOON} steps after the first change and {TOLERANCE:.0e} "
            "in all:",
            "",
            "| method | killed after | resumed from | samples, augmentations | epochs | soon | largest |",
            "| --- | --- | --- | --- | --- | ---: | ---: |",
        ]
        for row in found[table]:
            same = "the same" if row["same samples and augmentations"] else "OTHERS"
            whole = "each sample once" if row["epochs whole"] else "NOT WHOLE"
            kills, resumed = (", ".join(map(str, row[key])) for key in ("killed after", "resumed from"))
            soon, largest = (f"{row[key]:.1e}" for key in ("largest difference soon", "largest difference"))
            lines.append(f"| {row['method']} | {kills} | {resumed} | {same} | {whole} | {soon} | {largest} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
