"""`medpretrain evaluate`: a run's backbone on a dataset, beside the same backbone untrained."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from data_prep.dataset import Dataset
from data_prep.errors import UserError, nearest
from medpretrain.evaluation.evaluate import Result, evaluate
from medpretrain.evaluation.report import table, write_json
from medpretrain.training.build import build_backbone, from_scratch, load_run
from medpretrain.training.process import choose_device


def evaluate_run(
    protocol: str,
    run: Path,
    dataset: Path,
    *,
    label: str = "class",
    baseline: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    k: int = 200,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Result]:
    """Evaluate, print a table and write the JSON file beside the run.

    Returns:
        `trained` and, with a baseline, `random`.

    Raises:
        UserError: an unknown protocol or baseline, no run, no dataset, a split or label it lacks.
    """
    if baseline not in (None, "random"):
        raise UserError(f"there is no baseline {baseline!r}{nearest(str(baseline), ['random'])}")
    trained = load_run(run)
    data = Dataset.open(dataset)
    where = choose_device(device)
    backbones = {"trained": trained.backbone}
    if baseline == "random":
        backbones["random"] = build_backbone(from_scratch(trained.recipe))
    results = {
        name: evaluate(
            protocol,  # type: ignore[arg-type] # an unknown one is refused there
            backbone.to(where),
            data,
            trained.preprocessing,
            label=label,
            device=where,
            train_split=train_split,
            test_split=test_split,
            k=k,
        )
        for name, backbone in backbones.items()
    }
    name = f"{protocol}-{label}-{data.sha256[:8]}-step{trained.info.step}.json"
    path = out or trained.folder / "evaluation" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = trained.recipe
    write_json(path, results, {"recipe": recipe.name, "recipe_sha256": recipe.sha256, "step": trained.info.step})
    console = Console()
    console.print(table(results["trained"], results.get("random")))
    console.print(f"written to {path}", soft_wrap=True)
    return results
