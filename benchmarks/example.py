"""The example of docs/example: what medpretrain's evaluation says of short pretrainings on public images.

    python benchmarks/example.py DATA [--work runs/example] [--jobs 2] [--device auto] [--pages OUT]

Two questions, asked as the papers ask them, of networks small enough for two CPU cores in about two hours:

- MedNIST to BreastMNIST: ModAn-MulSupCon, SimCLR, supervised and random, ResNet-18 at 32 pixels. 5 folds x 3 repeats of
  ModAn-MulSupCon's probe and fine-tuning; label efficiency of the exact probe, with 3 seeds.
- Fundus: DINO with strong, weak, and weak and medical augmentation, ResNet-18 at 48 pixels, 3 seeds, split by patient.

Whatever is there already is kept, so that a stopped example goes on with the same command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEEDS = (0, 1, 2)
EXACT = ["--drop-duplicates", "exact"]
PREPARED = {
    "mednist": ["images", "mednist", "--labels", "mednist", "--split", "train=0.8,val=0.1,test=0.1", *EXACT],
    "breastmnist": ["images", "breastmnist/breastmnist.npz", "--labels", "breastmnist", *EXACT],
    "fundus": [
        *("retina", "fundus", "--labels", "fundus", "--patient-pattern", r"/(\d+)_(?:left|right)"),
        *("--split", "train=0.7,val=0.1,test=0.2"),
    ],
}
SMALL = [
    "data.channels=1",
    "backbone={name: resnet18}",
    "optim={name: adamw, lr: 1.0e-3, weight_decay: 1.0e-4, warmup: 0.1}",
    "train={epochs: 12, global_batch: 64, log_every: 10, threads: 1}",
    "views.crop.size=32",
]
MEDNIST = {
    "mulsupcon": ["modan_mulsupcon"],
    "simclr": ["simclr", "views.crop.crop=[0.2, 1.0]", "views.crop.blur.kernel=3", "method.projector=[512, 128]"],
    "supervised": ["supervised"],
}
_STRONG = "{p: 0.8, brightness: 0.4, contrast: 0.4}"
_MEDICAL = {
    "blur": "{p: 0.5, sigma: [0.1, 0.5]}",
    "noise": "{p: 0.5, std: 0.1}",
    "bias_field": "{p: 0.5, scale: 0.1}",
}
DINO = {
    "strong": ["views.global.crop=[0.4, 1.0]", "views.local.crop=[0.05, 0.4]"]
    + [f"views.{view}.jitter={_STRONG}" for view in ("global", "local")],
    "weak": [],
    "weak_med": [f"views.{view}.{name}={how}" for view in ("global", "local") for name, how in _MEDICAL.items()],
}
LEAST = ["data.threads=1", "tracking.uri=none"]


def pretrainings(work: Path) -> dict[str, list[str]]:
    """Arguments of `medpretrain train` by the run's name."""
    shards = work / "shards"
    runs = {name: [*recipe, *SMALL, f"data.path={shards / 'mednist'}"] for name, recipe in MEDNIST.items()}
    for seed in SEEDS:
        for name, views in DINO.items():
            runs[f"dino_{name}_{seed}"] = [
                *("dino_retina_weak_small", *views, "train.epochs=6", "train.log_every=20", "train.threads=1"),
                *("views.global.size=48", "views.local.size=32"),
                *(f"data.path={shards / 'fundus'}", f"seed={seed}"),
            ]
    return runs


def evaluations(work: Path) -> dict[str, list[str]]:
    """Arguments of `medpretrain evaluate` by a name of their own."""
    breast, fundus = (str(work / "shards" / name) for name in ("breastmnist", "fundus"))
    asked = {}
    for name in [*MEDNIST, "random"]:
        source = str(work / "runs" / name) if name in MEDNIST else f"random:{work / 'runs' / 'mulsupcon'}"
        to = [] if name in MEDNIST else ["--out", str(work / "runs" / "random" / "evaluation")]
        seeds, fractions = ",".join(map(str, SEEDS)), "1,5,10,20,50,100"
        folds = ["--folds", "5", "--repeats", "3"]
        asked |= {
            f"{name}-knn": ["knn", source, breast, "--k", "20", *to],
            f"{name}-linear": ["linear", source, breast, "--fractions", fractions, "--seeds", seeds, *to],
            f"{name}-linear-folds": ["linear", source, breast, "--variant", "modan", *folds, *to],
            f"{name}-folds": ["finetune", source, breast, "--variant", "modan", *folds, *to],
        }
    for seed in SEEDS:
        for name in DINO:
            run = work / "runs" / f"dino_{name}_{seed}"
            for protocol in (["knn", "--k", "20"], ["linear"]):
                more = ["--baseline", "random"] if name == "strong" else []
                asked[f"dino_{name}_{seed}-{protocol[0]}"] = [*protocol[:1], str(run), fundus, *protocol[1:], *more]
    return asked


def spaces(work: Path) -> dict[str, list[str]]:
    """Arguments of `medpretrain evaluate space`."""
    breast, fundus = (str(work / "shards" / name) for name in ("breastmnist", "fundus"))
    runs = dict.fromkeys(MEDNIST, breast) | {f"dino_{name}_0": fundus for name in DINO}
    return {f"{name}-space": ["space", str(work / "runs" / name), data] for name, data in runs.items()}


def reports(work: Path, pages: Path) -> dict[str, list[str]]:
    """Arguments of `medpretrain report`."""
    runs = work / "runs"
    dino = [str(runs / f"dino_{name}_{seed}") for name in DINO for seed in SEEDS]
    breast = [str(runs / name) for name in [*MEDNIST, "random"]]
    return {
        "breast": [*breast, str(pages / "mednist_to_breastmnist"), "--no-images", "--overwrite"],
        "fundus": [*dino, str(pages / "fundus"), "--no-images", "--overwrite"],
    }


class Steps:
    """Commands, each once: a file says that it was done."""

    def __init__(self, work: Path) -> None:
        self._work = work
        (work / "done").mkdir(parents=True, exist_ok=True)
        (work / "logs").mkdir(exist_ok=True)

    def run(self, name: str, arguments: list[str], *, always: bool = False) -> None:
        """A `medpretrain` command.

        Raises:
            RuntimeError: it failed; its log says why.
        """
        done, said = self._work / "done" / name, "\n".join(arguments)
        if not always and done.is_file() and done.read_text() == said:
            return
        started, log = time.perf_counter(), self._work / "logs" / f"{name}.log"
        with log.open("w") as out:
            command = [sys.executable, "-m", "medpretrain", *arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=out, stderr=out, env=environment, check=False).returncode
        if code:
            raise RuntimeError(f"{name} ended with {code}; see {log}")
        done.write_text(said)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/example"))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pages", type=Path, default=Path("docs/example"))
    given = parser.parse_args()
    work, steps = given.work, Steps(given.work)
    for name, (kind, source, *options) in PREPARED.items():
        to = work / "shards" / name
        steps.run(f"prep-{name}", ["prep", kind, str(given.data / source), str(to), *options])
    with ThreadPoolExecutor(given.jobs) as pool:
        trained = [
            pool.submit(
                steps.run,
                name,
                ["train", *arguments, *LEAST, f"run.dir={work / 'runs' / name}", f"device={given.device}"],
            )
            for name, arguments in pretrainings(work).items()
        ]
        for one in trained:
            one.result()
        measured = [
            pool.submit(steps.run, name, ["evaluate", *arguments, "--device", given.device])
            for name, arguments in {**evaluations(work), **spaces(work)}.items()
        ]
        for one in measured:
            one.result()
    given.pages.mkdir(parents=True, exist_ok=True)
    for name, arguments in reports(work, given.pages).items():
        steps.run(f"report-{name}", ["report", *arguments], always=True)
    if shutil.which("du"):
        subprocess.run(["du", "-sh", str(given.pages)], check=True)


if __name__ == "__main__":
    main()
