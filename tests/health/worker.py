"""One rank of a small gloo run that uses medpretrain/health as a training loop does; told what goes wrong.

python worker.py RUN key=value ...: each step adds numbers that differ from rank to rank over all ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.errors import UserError, WorkFailed
from medpretrain.health import last_words
from medpretrain.health.preemption import Preempted, Preemption
from medpretrain.health.restarts import refuse_no_progress
from medpretrain.health.watchdog import Watchdog
from medpretrain.training.process import joined

DEFAULTS = {
    "steps": 400,
    "pause": 0.02,
    "hang_s": 2.0,
    "slow": 1.5,
    "probe_s": 10.0,
    "fail": "",
    "fail_rank": -1,  # 99: all
    "fail_at": 5,
    "restarts": 3,
    "own_core": 0,
    "slow_data": -1,  # a rank
}


def fail(how: str) -> None:
    if how == "bug":
        raise KeyError("no such sample https://me:secret@mlflow.example")
    if how == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    if how == "user":
        raise UserError("tracking.uri=https://me:secret@mlflow.example cannot be used")
    if how == "work":
        raise WorkFailed("the loss is nan at step 5")
    if how == "loop":  # stuck in its own code while the others are in the collective
        while True:
            time.sleep(0.1)
    assert not how, how


def main(run: Path, options: dict) -> None:
    last_words.remember(run)
    torch.set_num_threads(1)
    with joined("cpu", hang_s=options["hang_s"]) as process:
        if options["own_core"]:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[process.rank % len(cores)]})
        if process.leads:
            run.mkdir(parents=True, exist_ok=True)
            (run / "recipe.yaml").touch()
        path = run / "checkpoint.json"
        step = process.agreed(lambda: json.loads(path.read_text())["step"] if path.exists() else 0)
        process.agreed(lambda: refuse_no_progress(run, step, options["restarts"]))

        def save() -> None:
            if process.leads:
                path.write_text(json.dumps({"step": step}))

        def on_event(event: dict) -> None:
            with open(run / f"events{process.rank}.jsonl", "a") as file:
                file.write(json.dumps(event) + "\n")

        watchdog = Watchdog(
            process, hang_s=options["hang_s"], slow=options["slow"], on_event=on_event, probe_s=options["probe_s"]
        )
        with (
            watchdog,
            Preemption(process.world) as preemption,
            open(run.parent / f"rank{process.rank}", "w", buffering=1) as progress,
        ):
            while step < options["steps"]:
                watchdog.mark(step, "data")
                faulty = options["fail_rank"] in (process.rank, 99) and step == options["fail_at"]
                if faulty and options["fail"] == "data":
                    time.sleep(1000)
                asked = time.perf_counter()
                if options["slow_data"] == process.rank:
                    time.sleep(0.02)
                watchdog.waited_for_data(time.perf_counter() - asked)
                watchdog.mark(step, "step")
                if faulty:
                    fail(options["fail"])
                numbers = torch.full((8,), float(process.rank + step))
                if process.world > 1:
                    dist.all_reduce(numbers)
                    expected = sum(rank + step for rank in range(process.world))
                    assert numbers.tolist() == [expected] * 8
                time.sleep(options["pause"])
                step += 1
                print(step, time.time(), file=progress)
                why = preemption.agreed(step)
                if why is not None:
                    watchdog.mark(step, "save")
                    save()
                    raise Preempted(f"{why}: step {step} is committed")
        save()


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word and not word.startswith(("-", "tracking")))
    chosen = {key: type(value)(given.get(key, value)) for key, value in DEFAULTS.items()}
    try:
        main(Path(sys.argv[1]), chosen)
    except Exception as error:
        last_words.end(error)
