"""`medpretrain evaluate`: one command a protocol; torch is imported when one is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError, nearest

if TYPE_CHECKING:
    from medpretrain.evaluation.protocols import Asked

app = typer.Typer(
    help="Measure a backbone: a run, an export, timm:NAME, or untrained: random:NAME, random:RUN.",
    no_args_is_help=True,
)

SourceName = Annotated[
    str, typer.Argument(metavar="SOURCE", help="a run, its checkpoint, an export, timm:NAME, random:NAME or random:RUN")
]
DatasetFolder = Annotated[Path, typer.Argument(help="a folder that `medpretrain prep` wrote")]
Label = Annotated[str, typer.Option(help="the label to predict")]
Baseline = Annotated[
    str | None, typer.Option(help="random: the same for the untrained network beside it", show_default=False)
]
TrainSplit = Annotated[str, typer.Option(help="what is learned from")]
TestSplit = Annotated[str, typer.Option(help="what is measured on")]
TestDataset = Annotated[
    Path | None, typer.Option(help="an external test set: its test split is measured on", show_default=False)
]
Fractions = Annotated[str, typer.Option(help="percent of the training patients, as in 1,5,10,20,50,100")]
Folds = Annotated[int, typer.Option(help="parts of all images, each measured on once; 0: the dataset's splits", min=0)]
Repeats = Annotated[int, typer.Option(help="of all folds, with other random numbers", min=1)]
Seeds = Annotated[str, typer.Option(help="as in 0,1,2")]
LeaveOut = Annotated[
    bool, typer.Option("--leave-out-unlabelled", help="measure without images that lack the label, and say so")
]
Resamples = Annotated[int, typer.Option(help="of the bootstrap by patients; 0: no intervals", min=0)]
Size = Annotated[int | None, typer.Option(help="pixels, for random:NAME", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Cache = Annotated[
    Path | None,
    typer.Option(help="where features are kept; MEDPRETRAIN_CACHE or ~/.cache by default", show_default=False),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="keep no features")]
Out = Annotated[
    Path | None, typer.Option(help="the folder of the results; RUN/evaluation by default", show_default=False)
]


@app.command()
def knn(
    source: SourceName,
    dataset: DatasetFolder,
    k: Annotated[int, typer.Option(help="neighbours", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="of their weights")] = 0.07,
    label: Label = "class",
    baseline: Baseline = None,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "test",
    test_dataset: TestDataset = None,
    fractions: Fractions = "100",
    folds: Folds = 0,
    seeds: Seeds = "0",
    leave_out: LeaveOut = False,
    resamples: Resamples = 1000,
    size: Size = None,
    device: Device = "auto",
    cache: Cache = None,
    no_cache: NoCache = False,
    out: Out = None,
) -> None:
    """The nearest training images vote, weighted by cosine similarity."""
    if not temperature > 0:
        raise UserError(f"--temperature must be positive, not {temperature}")
    from medpretrain.evaluation.protocols import Knn

    _evaluate(
        Knn(k=k, temperature=temperature),
        source,
        dataset,
        label=label,
        baseline=baseline,
        train_split=train_split,
        test_split=test_split,
        test_dataset=test_dataset,
        fractions=fractions,
        folds=folds,
        repeats=1,
        seeds=seeds,
        leave_out=leave_out,
        resamples=resamples,
        size=size,
        device=device,
        cache=cache,
        keep=not no_cache,
        out=out,
    )


@app.command()
def linear(
    source: SourceName,
    dataset: DatasetFolder,
    variant: Annotated[
        str, typer.Option(help="exact: logistic regression; amimv, modan: trained as in those papers")
    ] = "exact",
    label: Label = "class",
    baseline: Baseline = None,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "test",
    test_dataset: TestDataset = None,
    fractions: Fractions = "100",
    folds: Folds = 0,
    repeats: Repeats = 1,
    seeds: Seeds = "0",
    leave_out: LeaveOut = False,
    resamples: Resamples = 1000,
    size: Size = None,
    device: Device = "auto",
    cache: Cache = None,
    no_cache: NoCache = False,
    out: Out = None,
) -> None:
    """One linear layer on frozen features."""
    variants = ("exact", "amimv", "modan")
    if variant not in variants:
        raise UserError(f"there is no linear probe {variant!r}{nearest(variant, variants)}")
    from medpretrain.evaluation.protocols import Linear

    _evaluate(
        Linear.model_validate({"variant": variant}),
        source,
        dataset,
        label=label,
        baseline=baseline,
        train_split=train_split,
        test_split=test_split,
        test_dataset=test_dataset,
        fractions=fractions,
        folds=folds,
        repeats=repeats,
        seeds=seeds,
        leave_out=leave_out,
        resamples=resamples,
        size=size,
        device=device,
        cache=cache,
        keep=not no_cache,
        out=out,
    )


@app.command()
def finetune(
    source: SourceName,
    dataset: DatasetFolder,
    variant: Annotated[
        str,
        typer.Option(help="report: frozen, then unfrozen; modan: that paper's; plain; layer_decay: lower rates below"),
    ] = "report",
    label: Label = "class",
    baseline: Baseline = None,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "test",
    test_dataset: TestDataset = None,
    fractions: Fractions = "100",
    folds: Folds = 0,
    repeats: Repeats = 1,
    seeds: Seeds = "0",
    leave_out: LeaveOut = False,
    resamples: Resamples = 1000,
    size: Size = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """The backbone is trained on, with one linear layer."""
    variants = ("report", "modan", "plain", "layer_decay")
    if variant not in variants:
        raise UserError(f"there is no fine-tuning {variant!r}{nearest(variant, variants)}")
    from medpretrain.evaluation.protocols import FineTune

    _evaluate(
        FineTune.model_validate({"variant": variant}),
        source,
        dataset,
        label=label,
        baseline=baseline,
        train_split=train_split,
        test_split=test_split,
        test_dataset=test_dataset,
        fractions=fractions,
        folds=folds,
        repeats=repeats,
        seeds=seeds,
        leave_out=leave_out,
        resamples=resamples,
        size=size,
        device=device,
        cache=None,
        keep=False,
        out=out,
    )


@app.command()
def space(
    source: SourceName,
    dataset: DatasetFolder,
    label: Label = "class",
    split: Annotated[str, typer.Option(help="whose images are looked at")] = "test",
    view: Annotated[
        str, typer.Option(help="source: as the run's own views were made; default: the same for every source")
    ] = "source",
    views: Annotated[int, typer.Option(help="of each image", min=1)] = 2,
    projections: Annotated[str, typer.Option(help="maps to draw: tsne,umap or none")] = "tsne,umap",
    other_patients_only: Annotated[
        bool, typer.Option("--other-patients-only", help="show neighbours of other patients only")
    ] = False,
    leave_out: LeaveOut = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="write no pictures of patients")] = False,
    seed: Annotated[int, typer.Option(help="of views and maps", min=0)] = 0,
    size: Size = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """How features lie: SAD, SAA, CAD, CAC, GPU, alignment, uniformity, RankMe, distances, maps, neighbours."""
    from medpretrain.evaluation.of_source import measure_source

    measure_source(
        source,
        dataset,
        label=label,
        split=split,
        view=view,
        views=views,
        projections=() if projections == "none" else projections.split(","),
        other_patients_only=other_patients_only,
        leave_out=leave_out,
        images=not no_images,
        seed=seed,
        size=size,
        device=device,
        out=out,
    )


@app.command()
def imbalance(
    dataset: DatasetFolder,
    label: Label = "class",
    split: Annotated[str, typer.Option(help="whose images are counted")] = "train",
    leave_out: LeaveOut = False,
) -> None:
    """How unevenly the classes are filled: IR, CV, NE, Gini, RCR, and FB, PI or I (Table 1 of AMIMV)."""
    from rich.console import Console

    from data_prep.dataset import Dataset
    from medpretrain.evaluation.imbalance import imbalance as measure
    from medpretrain.evaluation.labelled import labelled, occurring_classes
    from medpretrain.evaluation.show import imbalance_table

    data = Dataset.open(dataset)
    part = labelled(data, [split], label, occurring_classes(data, label), leave_out=leave_out)
    measured = measure(part.counts(), part.classes)
    Console().print(imbalance_table(measured, f"label {label!r} of split {split!r} of {data.path.name}"))


def _evaluate(
    asked: Asked,
    source: str,
    dataset: Path,
    *,
    label: str,
    baseline: str | None,
    train_split: str,
    test_split: str,
    test_dataset: Path | None,
    fractions: str,
    folds: int,
    repeats: int,
    seeds: str,
    leave_out: bool,
    resamples: int,
    size: int | None,
    device: str,
    cache: Path | None,
    keep: bool,
    out: Path | None,
) -> None:
    percents = [_number(one, "--fractions") for one in fractions.split(",")]
    numbers = [_number(one, "--seeds") for one in seeds.split(",")]
    if not all(number.is_integer() and number >= 0 for number in numbers):
        raise UserError(f"--seeds {seeds}: give whole numbers from 0 on, as in 0,1,2")
    from medpretrain.evaluation.feature_cache import default_folder
    from medpretrain.evaluation.of_source import evaluate_source

    evaluate_source(
        asked,
        source,
        dataset,
        label=label,
        baseline=baseline,
        train_split=train_split,
        test_split=test_split,
        test_dataset=test_dataset,
        fractions=percents,
        folds=folds,
        repeats=repeats,
        seeds=[int(number) for number in numbers],
        leave_out=leave_out,
        resamples=resamples,
        size=size,
        device=device,
        cache=(cache or default_folder()) if keep else None,
        out=out,
    )


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is no number; give them as in 1,5,10") from None
