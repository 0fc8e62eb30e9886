"""A rank of a real run that is held up half of the time: when is it named, and is an even pair left alone?

    python benchmarks/slow_rank.py [--even 180] [--patience 300] [--out benchmarks/results]

Two processes train, with the default `faults.slow` (1.5) and a look at the speeds every 10 s. First both go as they
can; then rank 1 is stopped and continued (SIGSTOP, SIGCONT) every 2 ms, about as long as a look takes, so that it
has half of the time; then it is let go. Run it on a machine with a core for each process and nothing else to do: where
processes share cores, one of them really is slower than the other at times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jobs

from medpretrain.health.last_words import read_rows
from medpretrain.tracking.metrics_log import read_metrics

HALF_S = 0.002


def hold_up(pid: int, over: threading.Event) -> None:
    while not over.wait(HALF_S):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(HALF_S)
        os.kill(pid, signal.SIGCONT)


def steps_per_s(run: Path, since: float) -> float:
    times = [row["time"] for row in read_metrics(run / "metrics.jsonl") if row["time"] > since]
    return (len(times) - 1) / (times[-1] - times[0])


def named(run: Path, since: float) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "events.jsonl") if row["event"] == "slow" and row["time"] > since]


def measure(scratch: Path, even_s: float, patience_s: float) -> dict[str, Any]:
    run, recipe = scratch / "run", scratch / "recipe.yaml"
    jobs.write_recipe(recipe, "dino", jobs.make_dataset(scratch), steps=10**6, every=10**5)
    job = jobs.Job(recipe, run, 2)
    try:
        while jobs.last_step(run) < 50:
            assert job.alive()
            time.sleep(0.1)
        began = time.time()
        time.sleep(even_s)
        found = {"even_s": even_s, "steps_per_s": steps_per_s(run, began), "named_of_an_even_pair": named(run, began)}
        over, began = threading.Event(), time.time()
        holder = threading.Thread(target=hold_up, args=(job.pids[1], over))
        holder.start()
        try:
            while not named(run, began) and time.time() < began + patience_s:
                assert job.alive()
                time.sleep(0.5)
        finally:
            over.set()
            holder.join()
        waited = time.time() - began
        return found | {"held_up_s": waited, "slower_steps_per_s": steps_per_s(run, began), "named": named(run, began)}
    finally:
        job.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--even", type=float, default=180, help="seconds")
    parser.add_argument("--patience", type=float, default=300, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slow-") as scratch:
        found = measure(Path(scratch), given.even, given.patience)
    found |= {"machine": jobs.machine(), "load": os.getloadavg()[1], "date": str(datetime.date.today())}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    jobs.write_by_rename(given.out / "slow_rank.json", text)
    return int(bool(found["named_of_an_even_pair"]) or [row["slow_rank"] for row in found["named"]] != [1])


if __name__ == "__main__":
    sys.exit(main())
