"""What tracking costs a training step, and what it loses, with MLflow working, refusing, hanging and killed half-way.

    PYTHONPATH=. python benchmarks/tracking.py [--rounds 5] [--steps 75] [--out benchmarks/results]

A loop of matrix products of about 20 ms logs every step, with the measures of the system. Variants take turns of
`steps` steps, in an order drawn anew each round, so that whatever else the machine does meets all of them; each goes on
in its own run folder. A step is compared with the bare loop's of the same round (which logs to metrics.jsonl too, and
has no sender); the median over rounds is given. In the end each run is synced to a fresh
SQLite store and its points counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from medpretrain.tracking.metrics_log import MetricsLog, read_metrics
from medpretrain.tracking.replay import sync
from medpretrain.tracking.system import system_metrics
from tests.tracking.runs import free_port, hanging_server, make_run, run_id, start_server, stop_server, track

SIZE, STEP_S = 384, 0.020
VARIANTS = ("none", "SQLite", "server", "refusing", "hanging", "killed half-way")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=75, help="of each turn")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    draw = random.Random(given.seed)
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    logging.getLogger("medpretrain").setLevel(logging.ERROR)
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="tracking-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        ports = free_port(), free_port()
        working = start_server(folder / "server", ports[0])
        stack.callback(stop_server, working)
        dying = start_server(folder / "dying", ports[1])
        stack.callback(stop_server, dying)
        uris = {
            "SQLite": f"sqlite:///{folder / 'mlflow.db'}",
            "server": f"http://127.0.0.1:{ports[0]}",
            "refusing": f"http://127.0.0.1:{free_port()}",
            "hanging": stack.enter_context(hanging_server()),
            "killed half-way": f"http://127.0.0.1:{ports[1]}",
        }
        runs = {name: make_run(folder / "runs" / name.replace(" ", "-")) for name in VARIANTS}
        seconds: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
        products = calibrate()
        for turn in range(-1, given.rounds):  # the first one imports MLflow and is not counted
            order = list(VARIANTS)
            draw.shuffle(order)
            for name in order:
                kill = dying if name == "killed half-way" and turn == given.rounds // 2 else None
                tracker = track(runs[name], uris[name], interval_s=1.0) if name in uris else None
                took = steps(runs[name], (turn + 1) * given.steps, given.steps, products, kill)
                if tracker is not None:
                    tracker.close(2.0)
                if turn >= 0:
                    seconds[name].append(took)
            load.append(os.getloadavg()[0])
            print(f"round {turn + 1} of {given.rounds}", flush=True)
        lost = {name: lost_points(runs[name], f"sqlite:///{folder / 'fresh.db'}") for name in VARIANTS}
    rows = []
    for name in VARIANTS:
        pairs = zip(seconds[name], seconds["none"], strict=True)
        ratios = [statistics.median(ours) / statistics.median(bare) for ours, bare in pairs]
        rows.append(
            {
                "mlflow": name,
                "median_step_ms": 1000 * statistics.median(second for turn in seconds[name] for second in turn),
                "of_bare_loop": statistics.median(ratios),
                "rounds": ratios,
                "longest_step_ms": 1000 * max(second for turn in seconds[name] for second in turn),
                "points": lost[name][1],
                "lost_after_sync": lost[name][0],
            }
        )
    report(rows, given, load)
    return int(any(row["lost_after_sync"] for row in rows))


def calibrate() -> int:
    """Products that take about as long as a step shall."""
    a = torch.randn(SIZE, SIZE)
    started = time.perf_counter()
    for _ in range(100):
        a @ a
    return max(1, round(STEP_S / ((time.perf_counter() - started) / 100)))


def steps(run: Path, first: int, count: int, products: int, kill: object) -> list[float]:
    """Seconds of each step, with what it logs."""
    a, took = torch.randn(SIZE, SIZE), []
    with MetricsLog(run / "metrics.jsonl") as log:
        for step in range(first, first + count):
            if kill is not None and step == first + count // 2:
                stop_server(kill)
            started = time.perf_counter()
            for _ in range(products):
                product = a @ a
            loss = product.mean().item()
            row = {"step": step, "loss": loss, "lr": 1 / (step + 1), "grad_norm": abs(loss), "images_per_s": 64.0}
            log.append(row | system_metrics(run))
            took.append(time.perf_counter() - started)
    return took


def lost_points(run: Path, uri: str) -> tuple[int, int]:
    """Points of a run that a fresh store lacks after a sync, and all its points."""
    from mlflow import MlflowClient

    sync(run, uri)
    client, here = MlflowClient(uri), run_id(run, uri)
    wanted = [
        (name, row["step"], value)
        for row in read_metrics(run / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "time")
    ]
    names = {name for name, _, _ in wanted}
    there = [(name, point.step, point.value) for name in names for point in client.get_metric_history(here, name)]
    assert len(there) == len(set(there)), "a point is there twice"
    return len(set(wanted) - set(there)), len(wanted)


def report(rows: list[dict], given: argparse.Namespace, load: list[float]) -> None:
    about = {
        "command": f"python benchmarks/tracking.py --rounds {given.rounds} --steps {given.steps} --seed {given.seed}",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(value, 1) for value in load],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "tracking.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    lines = [
        "# What tracking costs a step, and what is lost",
        "",
        f"`{about['command']}`, {about['date']}, {about['cores']} cores, Python {about['python']}; every step logged, "
        f"the sender looks once a second. Other work ran on the machine: load average "
        f"{min(load):.1f} to {max(load):.1f}. The step time beside the bare "
        "loop's is the median over rounds, with the smallest and largest.",
        "",
        "| MLflow | median step | beside the bare loop | longest step | points | lost after `sync` |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    if max(load) > (os.cpu_count() or 1):
        lines[2] += " That is more than the cores can do: these step times show the other work, not the tracking."
    for row in rows:
        low, high = min(row["rounds"]), max(row["rounds"])
        lines.append(
            f"| {row['mlflow']} | {row['median_step_ms']:.2f} ms | {100 * (row['of_bare_loop'] - 1):+.2f} % "
            f"({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f}) | {row['longest_step_ms']:.0f} ms "
            f"| {row['points']} | {row['lost_after_sync']} |"
        )
    (given.out / "tracking.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
