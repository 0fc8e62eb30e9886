"""Does every method learn something from real images? Short runs on CPU, kNN before and after.

    medpretrain prep images DATA/mednist shards/mednist --labels mednist --split train=0.8,val=0.1,test=0.1 \\
        --drop-duplicates exact
    medpretrain prep images DATA/breastmnist/breastmnist.npz shards/breastmnist --labels breastmnist \\
        --drop-duplicates exact
    python benchmarks/learn.py shards/mednist shards/breastmnist [--seeds 0 1 2] [--jobs 2] [--out benchmarks/results]

Each method's shipped recipe, made small: ResNet-18, 32 pixels, 64 images a batch, AdamW, a few hundred steps. The
binary methods see BreastMNIST and are judged by AUROC, the others MedNIST by accuracy: the test split, 20 neighbours.
The margin is over the same backbone with the same seed, untrained. One that does not reach it ends the command with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medpretrain.evaluation.results import SUFFIX, read
from medpretrain.methods import METHODS, method_class

STEPS = {"labels": 200, "images": 400, "byol": 600, "dino": 600, "nnclr": 600}
"""Without labels it takes longer; longest where the target is made of features that mean nothing yet."""
MARGIN = {"mednist": ("accuracy", 0.05), "breastmnist": ("auroc", 0.05)}
BINARY = ("supervised_minority", "supervised_prototypes")
RECIPES = {
    "amimv": "amimv_medmnist",
    "dino": "dino_retina_weak_small",
}
COMMON = [
    "data.channels=1",
    "backbone={name: resnet18}",
    "optim={name: adamw, lr: 1.0e-3, weight_decay: 1.0e-4, warmup: 0.1}",
    "train={global_batch: 64, log_every: 20, threads: 1}",
    "checkpoint.every=1000",
    "data.threads=1",
    "device=cpu",
    "tracking.uri=none",
]
CROP = "views.crop.size=32"
STRONG = [CROP, "views.crop.crop=[0.2, 1.0]", "views.crop.blur.kernel=3"]
"""Recipes for ImageNet: of 32 pixels a crop of 0.08 leaves 9, and a blur is a tenth of the image wide."""
PROJECTOR = "method.projector=[512, 128]"
PREDICTOR = "method.predictor=[512, 128]"
QUEUE = "method.queue=1024"
MOMENTUM = "method.momentum=0.99"
SMALL: dict[str, list[str]] = {
    "amimv": ["views.normalised.size=32", "views.augmented.size=32", MOMENTUM],
    "barlow_twins": [*STRONG, PROJECTOR],
    "bcl": [CROP, PROJECTOR],
    "byol": [*STRONG, PROJECTOR, PREDICTOR, MOMENTUM],
    "dino": ["views.global.size=32", "views.local.size=24", "method.prototypes=512", "method.teacher_momentum=0.98"],
    "kcl": [CROP, PROJECTOR, QUEUE, MOMENTUM],
    "moco_v3": [*STRONG, PROJECTOR, PREDICTOR],
    "modan_mulsupcon": [CROP],
    "nnclr": [*STRONG, PROJECTOR, PREDICTOR, QUEUE],
    "paco": [CROP, PROJECTOR, QUEUE, MOMENTUM],
    "ressl": ["views.strong.size=32", "views.strong.blur.kernel=3", "views.weak.size=32", PROJECTOR, QUEUE, MOMENTUM],
    "sbc": [CROP, PROJECTOR, "method.warmup_epochs=1", "method.every_epochs=1"],
    "simclr": [*STRONG, PROJECTOR],
    "supcon": [CROP, PROJECTOR],
    "supervised": [CROP],
    "supervised_minority": [CROP, PROJECTOR],
    "supervised_prototypes": [CROP, PROJECTOR],
    "tsc": [CROP, PROJECTOR, QUEUE, MOMENTUM],
    "vicreg": [*STRONG, "method.projector=[512, 512]"],
}


@dataclass(frozen=True)
class Job:
    method: str
    seed: int
    dataset: str
    shards: Path
    folder: Path

    @property
    def recipe(self) -> str:
        return RECIPES.get(self.method, self.method)

    @property
    def steps(self) -> int:
        return STEPS.get(self.method, STEPS["images" if method_class(self.method).labels == "none" else "labels"])


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate in a process of its own; a row of the table."""
    folder = job.folder / f"{job.method}-{job.seed}"
    found, settings = folder / "knn", folder / "settings.json"
    overrides = [f"data.path={job.shards}", f"run.dir={folder / 'run'}", f"seed={job.seed}", f"train.steps={job.steps}"]
    train = ["train", job.recipe, *COMMON, *SMALL[job.method], *overrides]
    # A table that was stopped goes on; a run with other settings is made anew.
    if not settings.is_file() or json.loads(settings.read_text()) != train:
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        _medpretrain(*train, log=folder / "train.log")
        (folder / "seconds").write_text(str(time.perf_counter() - started))
        knn = ["evaluate", "knn", str(folder / "run"), str(job.shards), "--baseline", "random", "--k", "20"]
        _medpretrain(*knn, "--device", "cpu", "--out", str(found), log=folder / "knn.log")
        settings.write_text(json.dumps(train))
    measured = [read(path)[0] for path in found.glob(f"*{SUFFIX}")]
    results = {"random" if one.source.kind == "random" else "trained": one.summaries[0].mean for one in measured}
    metric, margin = MARGIN[job.dataset]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": job.method,
        "seed": job.seed,
        "steps": job.steps,
        "dataset": job.dataset,
        "metric": metric,
        "margin": margin,
        "random": results["random"][metric],
        "trained": results["trained"][metric],
        "loss": [rows[0]["loss"], rows[-1]["loss"]],
        "seconds": float((folder / "seconds").read_text()),
    }


def _medpretrain(*arguments: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        command = [sys.executable, "-m", "medpretrain", *arguments]
        done = subprocess.run(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with {done.returncode}; see {log}")


def markdown(rows: list[dict[str, Any]], about: str) -> str:
    lines = [
        "| method | images | metric | untrained | trained | least gain | seeds | steps | loss, first, last | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        gains = [row["trained"] - row["random"] for row in mine]
        before, after = (_spread([row[kind] for row in mine]) for kind in ("random", "trained"))
        first, last = (statistics.mean(row["loss"][end] for row in mine) for end in (0, 1))
        minutes = statistics.median(row["seconds"] for row in mine) / 60
        lines.append(
            f"| `{method}` | {mine[0]['dataset']} | {mine[0]['metric']} | {before} | {after} | {min(gains):+.3f} | "
            f"{len(mine)} | {mine[0]['steps']} | {first:.3g}, {last:.3g} | {minutes:.1f} |"
        )
    return f"# Every method learns\n\n{about}\n\n" + "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mednist", type=Path)
    parser.add_argument("breastmnist", type=Path)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=Path, default=Path("runs/learn"), help="kept, so that a stopped table goes on")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    shards = {"mednist": given.mednist, "breastmnist": given.breastmnist}
    dataset = {method: "breastmnist" if method in BINARY else "mednist" for method in given.methods}
    jobs = [
        Job(method, seed, dataset[method], shards[dataset[method]], given.runs)
        for seed in given.seeds
        for method in given.methods
    ]
    rows = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(run, jobs):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    rows.sort(key=lambda row: (row["method"], row["seed"]))
    margins = " and ".join(f"{margin} in {metric} on {name}" for name, (metric, margin) in MARGIN.items())
    import torch

    machine = f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, torch {torch.__version__}"
    about = (
        f"`python benchmarks/learn.py`: {machine}, {given.jobs} runs at a time on one thread each. kNN (k 20) on the "
        f"test split, before and after; asked for is a gain of {margins} in every seed."
    )
    text = markdown(rows, about)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "learn.md").write_text(text)
        (given.out / "learn.json").write_text(json.dumps(rows, indent=1) + "\n")
    short = sorted({row["method"] for row in rows if row["trained"] - row["random"] < row["margin"]})
    if short:
        sys.exit(f"short of the margin: {', '.join(short)}")


if __name__ == "__main__":
    main()
