"""Kill runs again and again with SIGKILL, half of the time inside a save, until each has come to its end by itself.

    python benchmarks/crashes.py [--kills 200] [--seed N] [--out benchmarks/results]

A run is started with one command; the job is killed (all its processes), the same command is given again, and so on
until it ends. Moments are drawn by the seed: in the save after next, while it starts, or after some steps. What a kill
hit is read from the folder of checkpoints right after it: a hidden folder of this launch with a later step than any
committed checkpoint is a save that was under way. Lost work is counted in steps: from the newest committed checkpoint
to the last row of metrics that this launch wrote. It may be up to one interval between checkpoints and, since training
goes on while a save is written, another one where a save was under way. Each restart must go on from exactly that
checkpoint, and each run must end as the undisturbed one: tensors, rows and samples are compared to the bit. The files
are written after each run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs

from medpretrain.tracking.metrics_log import read_metrics

STEPS, EVERY, KEEP = 48, 4, 3
HOW = (
    ("modan_mulsupcon", 1, "strategy=ddp"),
    ("dino", 2, "strategy=ddp"),
    ("kcl", 1, "strategy=ddp"),
    ("amimv", 2, "strategy=fsdp2"),
)
_HIDDEN = re.compile(r"\.tmp-step-(\d+)(?:\.old)?-[0-9a-f]+")
_SOON_S = 0.02  # a save of these networks takes about as long

Kill = dict[str, Any]


def hidden(run: Path) -> dict[str, int]:
    """The folders of checkpoints that are being written or removed, with their steps."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {name: int(found[1]) for name in names if (found := _HIDDEN.fullmatch(name))}


def moment(aim: str, run: Path, draw: random.Random, start_s: float) -> Callable[[], bool]:
    """Whether the drawn moment of a launch has come; asked again and again."""
    began, wall = time.monotonic(), time.time()
    if aim == "start":
        after = draw.random() * start_s
        return lambda: time.monotonic() >= began + after
    if aim == "steps":
        rows, later = draw.randrange(1, 2 * EVERY + 1), draw.random() * 0.2
        due: list[float] = []

        def enough() -> bool:
            if not due:
                time.sleep(0.01)
                if sum(row["time"] >= wall for row in rows_of(run)) >= rows:
                    due.append(time.monotonic() + later)
            return bool(due) and time.monotonic() >= due[0]

        return enough
    known, saves, later = set(hidden(run)), draw.choice((1, 1, 2, 3)), draw.random() * _SOON_S
    seen: set[int] = set()

    def inside() -> bool:
        now = jobs.committed(run) or 0
        seen.update(step for name, step in hidden(run).items() if name not in known and step > now)
        if len(seen) < saves:
            return False
        time.sleep(later)
        return True

    return inside


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def launch(
    recipe: Path, run: Path, world: int, option: str, aim: str | None, draw: random.Random, start_s: float
) -> Kill | None:
    """Start the run, and kill it at a drawn moment; None where it ended first, or where nothing was to be killed."""
    before, known, starts = jobs.committed(run) or 0, set(hidden(run)), len(jobs.starts(run))
    come = moment(aim, run, draw, start_s) if aim else None
    wall = time.time()
    job = jobs.Job(recipe, run, world, option)
    try:
        while come is None or not come():
            if not job.alive() or come is None:
                job.end()
                return None
            if time.monotonic() > job.began + jobs.PATIENCE_S:
                raise RuntimeError(f"the moment to kill {run} never came: {aim}")
            time.sleep(0.001)
        if not job.kill():
            return None  # it was ending; the next launch finds what is missing
    finally:
        job.kill()
    now = jobs.committed(run) or 0
    new = {name: step for name, step in hidden(run).items() if name not in known}
    saving = [name for name, step in new.items() if step > now]
    noted = jobs.starts(run)[starts:]
    steps = [row["step"] for row in rows_of(run) if row["time"] >= wall]
    reached = max(steps, default=now)
    if saving:
        files = sorted(path.name for path in (run / "checkpoints" / saving[0]).iterdir())
        hit = "save: manifest there" if "manifest.json" in files else "save: tensors being written"
    elif new:
        hit = "an old checkpoint being removed"
    else:
        hit = "steps" if steps else "start: after the checkpoint was read" if noted else "start"
    return {
        "aim": aim,
        "hit": hit,
        "inside a save": bool(saving),
        "committed before": before,
        "resumed from": noted[0] if noted else None,
        "committed": now,
        "saving": new[saving[0]] if saving else None,
        "last row": reached,
        "lost": max(0, reached - now),
        "seconds": round(time.monotonic() - job.began, 1),
    }


def faults(kill: Kill) -> list[str]:
    """What a kill did that it must not be able to do."""
    found = []
    if kill["resumed from"] not in (None, kill["committed before"]):
        found.append(f"went on from {kill['resumed from']} and not from {kill['committed before']}")
    if kill["committed"] < kill["committed before"]:
        found.append(f"lost the checkpoint of step {kill['committed before']}")
    if kill["lost"] > 2 * EVERY or (kill["saving"] or 0) > kill["committed"] + EVERY:
        found.append(f"lost {kill['lost']} steps")
    off = [step for step in (kill["saving"], kill["committed"]) if (step or 0) % EVERY]
    if off:
        found.append(f"saved step {off[0]}, which was not due")
    return found


def killed_run(
    recipe: Path, run: Path, world: int, option: str, kills: int, inside: Callable[[int], bool], draw: random.Random
) -> list[Kill]:
    """Start and kill until it ends, at most `kills` times.

    Args:
        inside: whether after so many kills of this run, that hit a save, the next must aim at one too.
    """
    found: list[Kill] = []
    start_s = 10.0
    while True:
        must = inside(sum(kill["inside a save"] for kill in found) * 2 - len(found))
        aim = "save" if must or draw.random() < 0.5 else draw.choice(("start", "steps", "steps"))
        kill = launch(recipe, run, world, option, aim if len(found) < kills else None, draw, start_s)
        if kill is not None:
            found.append(kill)
            print(len(found), json.dumps(kill), *faults(kill), flush=True)
            if kill["aim"] == "steps":
                start_s = kill["seconds"]
        elif jobs.committed(run) == STEPS:
            return found


def campaign(
    scratch: Path, kills: int, seed: int, how: tuple[tuple[str, int, str], ...], tell: Callable[[list[Any]], None]
) -> list[dict[str, Any]]:
    """Runs, one after another, until so many kills are done; a row for each, told after each."""
    draw = random.Random(seed)
    dataset = jobs.make_dataset(scratch)
    rows: list[dict[str, Any]] = []
    done = balance = 0
    while done < kills:
        method, world, option = how[len(rows) % len(how)]
        folder = scratch / f"{method}-{world}-{option}"
        recipe, whole, run = folder / "recipe.yaml", folder / "whole", folder / "killed"
        if not whole.exists():
            folder.mkdir()
            jobs.write_recipe(recipe, method, dataset, steps=STEPS, every=EVERY, keep=KEEP)
            jobs.Job(recipe, whole, world, option).end()
        found = killed_run(recipe, run, world, option, kills - done, lambda own, so_far=balance: so_far + own < 0, draw)
        difference = jobs.difference(run, whole, STEPS)
        names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != ".writer")
        expected = sorted(path.name for path in (whole / "checkpoints").iterdir() if path.name != ".writer")
        rows.append(
            {
                "method": method,
                "world": world,
                "strategy": option.removeprefix("strategy="),
                "difference": str(difference),
                "rows measured again": len(jobs.measured_again(run)),
                "checkpoints": names,
                "kills": found,
                "ok": not difference and names == expected and not any(faults(kill) for kill in found),
            }
        )
        done += len(found)
        balance += 2 * sum(kill["inside a save"] for kill in found) - len(found)
        tell(rows)
        shutil.rmtree(run)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    print(f"--seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="crashes-") as scratch:
        rows = campaign(Path(scratch), given.kills, given.seed, HOW, lambda rows: write(given, rows))
    kills = [kill for row in rows for kill in row["kills"]]
    enough = 2 * sum(kill["inside a save"] for kill in kills) >= len(kills)
    return int(not (enough and all(row["ok"] for row in rows)))


def write(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    about = {"seed": given.seed, "machine": jobs.machine(), "date": str(datetime.date.today())}
    constants = {"steps": STEPS, "every": EVERY, "global_batch": jobs.BATCH}
    jobs.write_by_rename(
        given.out / "crashes.json", json.dumps(about | constants | {"runs": rows}, indent=1, default=str) + "\n"
    )
    jobs.write_by_rename(given.out / "crashes.md", markdown(given, rows))


def markdown(given: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    kills = [kill for row in rows for kill in row["kills"]]
    hits = Counter(kill["hit"] for kill in kills)
    inside = [kill for kill in kills if kill["inside a save"]]
    outside = [kill for kill in kills if not kill["inside a save"]]
    noted = [kill for kill in kills if kill["resumed from"] is not None]
    exact = sum(kill["resumed from"] == kill["committed before"] for kill in noted)
    lines = [
        f"# {len(kills)} times SIGKILL to a training job",
        "",
        f"`python benchmarks/crashes.py --kills {given.kills} --seed {given.seed}`, {datetime.date.today()}, "
        f"{jobs.machine()}; runs of {STEPS} steps of {jobs.BATCH} images, a checkpoint every {EVERY}, written in the "
        "background.",
        "",
        f"{sum(row['ok'] for row in rows)} of {len(rows)} runs, each given the same command until it ended, ended as "
        "the undisturbed run to the bit: all tensors of the last checkpoint, all rows of metrics, all samples and "
        f"augmentations, also what was done before a kill and again after it. {len(inside)} of {len(kills)} kills were "
        f"inside a save. Of the launches that came to their first step or were killed just before it, {exact} of "
        f"{len(noted)} had gone on from the newest committed checkpoint. Steps lost, from it to the last row of "
        f"metrics: at most {max((kill['lost'] for kill in outside), default=0)} with no save under way, and "
        f"{max((kill['lost'] for kill in inside), default=0)} inside a save, which goes on beside the steps.",
        "",
        "| killed in | kills | steps lost at most |",
        "| --- | ---: | ---: |",
    ]
    for hit, count in hits.most_common():
        lines.append(f"| {hit} | {count} | {max(kill['lost'] for kill in kills if kill['hit'] == hit)} |")
    lines += ["", "| run | processes | strategy | kills | inside a save | different |", "| --- | ---: | --- | ---: |"]
    lines[-1] += " ---: | --- |"
    for row in rows:
        saves = sum(kill["inside a save"] for kill in row["kills"])
        lines.append(
            f"| {row['method']} | {row['world']} | {row['strategy']} | {len(row['kills'])} | {saves} | "
            f"{row['difference']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
