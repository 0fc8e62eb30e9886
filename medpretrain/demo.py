"""`medpretrain demo`: the whole road on images made up on the spot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from data_prep.errors import UserError
from data_prep.images import prepare
from data_prep.synthetic import IMAGES, LABELS, PATIENT_PATTERN, make_demo_images
from data_prep.verify import verify
from medpretrain.evaluation.of_source import evaluate_source
from medpretrain.evaluation.protocols import Knn
from medpretrain.export.of_run import export_run
from medpretrain.recipe_file import load_recipe
from medpretrain.training.loop import train

RECIPES = ("demo_modan_mulsupcon", "demo_dino")
_MARK = ".medpretrain-demo"
_SPLIT = {"train": 0.7, "test": 0.3}


def run_demo(out: Path, *, per_class: int, steps: int | None = None, seed: int = 0) -> None:
    """Images, shards, two pretrained backbones, their kNN beside the untrained ones', exports.

    Args:
        out: an earlier demo there is replaced; anything else is not.
        per_class: images made of each of the ten classes.
        steps: of each run; None: the recipes' own.

    Raises:
        UserError: `out` holds something that is not a demo.
    """
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / _MARK).is_file()):
            raise UserError(f"{out} holds something that is not an earlier demo; give another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()
    console = Console()
    console.rule("1. images: made up, of ten classes")
    make_demo_images(out / "source", per_class=per_class, seed=seed)
    console.rule("2. shards: checked, split by patient, with modality and anatomy")
    shards = out / "shards"
    done = prepare(
        out / "source" / IMAGES,
        shards,
        labels=str(out / "source" / LABELS),
        patient_pattern=PATIENT_PATTERN,
        split=_SPLIT,
        seed=seed,
        shard_size=256,
        workers=len(os.sched_getaffinity(0)),
    )
    problems = verify(shards, workers=len(os.sched_getaffinity(0)))
    assert not problems, problems
    console.print(f"{done.info.samples} images in {len(done.info.shards)} shards, every byte and image verified")
    for number, name in enumerate(RECIPES, start=3):
        console.rule(f"{number}. pretraining, kNN and export: {name}")
        overrides = [f"data.path={shards}", f"run.dir={out / 'runs' / name}"]
        recipe = load_recipe(name, overrides + ([f"train.steps={steps}"] if steps else []))
        run = train(recipe).run
        evaluate_source(Knn(k=20), str(run), shards, baseline="random", resamples=0)  # few patients
        export_run(run, out / "exports" / name)
    console.rule("where everything lies")
    for place, what in (
        (out / "source", "the images"),
        (shards, "the dataset: plain WebDataset shards and their index"),
        (out / "runs", "a folder a run: recipe, metrics.jsonl, checkpoints, evaluation"),
        (out / "exports", "a folder a backbone: timm loads it, README.md is its card"),
    ):
        console.print(f"{place}  {what}", soft_wrap=True)
    default = f"sqlite:///{(out / 'runs' / 'mlflow.db').resolve()}"
    tracked = "$MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else default  # it may hold a password
    console.print(f"curves and parameters:  mlflow ui --backend-store-uri {tracked}", soft_wrap=True)
