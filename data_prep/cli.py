"""`medpretrain prep`: from pictures to shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.dataset import Dataset, read_info
from data_prep.images import SHARD_SIZE, Summary, prepare
from data_prep.labels import VOCABULARIES
from data_prep.plan import parse_split
from data_prep.stats import stats
from data_prep.verify import verify

app = typer.Typer(help="Turn images into a checked, de-identified dataset of shards.", no_args_is_help=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing in a log file."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


@app.command("images")
def images_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder (its sub-folders are the classes; train/, val/ and test/ at the top are splits), a .csv or "
            ".parquet manifest (columns: path, optional patient and split, and labels), or a MedMNIST-style .npz.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The dataset: a folder that does not exist yet.", show_default=False)],
    labels: Annotated[
        str | None,
        typer.Option(help="Modality and anatomy by class: a YAML file, or mednist, fundus, breastmnist."),
    ] = None,
    label_column: Annotated[
        list[str] | None, typer.Option(help="Keep this label column only; may be given several times.")
    ] = None,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Folders or columns are no labels; use it where they name patients.")
    ] = False,
    patient_pattern: Annotated[
        str | None,
        typer.Option(
            help=r"Regular expression; its group 1 in an image's path is the patient: '(\d+)_(?:left|right)'."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split by patient (by image where unknown): train=0.8,val=0.1,test=0.1.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of shuffle, split and pseudonyms. Keep a number of your own secret where ids can be guessed."
        ),
    ] = 0,
    resize: Annotated[
        int | None, typer.Option(help="Shrink larger images to this shorter side, in pixels; they are re-encoded.")
    ] = None,
    trust_images: Annotated[
        bool, typer.Option("--trust-images", help="Read headers only: much faster, but damaged pixels pass.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="The most images in a shard.")] = SHARD_SIZE,
    workers: Annotated[int, typer.Option(help="Processes. The result does not depend on it.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier dataset in OUT, and its link table.")
    ] = False,
) -> None:
    """Pack images into shards, checked and without metadata.

    File names, patient ids, EXIF, comments and text chunks do not enter the dataset; burned-in text and the names of
    classes do. Damaged images are left out, with the reason in quarantine.parquet.
    """
    chosen: list[str] | None = [] if no_labels else (label_column or None)
    if no_labels and label_column:
        raise typer.BadParameter("--no-labels and --label-column exclude each other")
    with _progress("images") as on_progress:
        summary = prepare(
            source,
            out,
            labels=labels,
            label_columns=chosen,
            patient_pattern=patient_pattern,
            split=None if split is None else parse_split(split),
            seed=seed,
            resize=resize,
            trust_images=trust_images,
            shard_size=shard_size,
            workers=workers,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    _report(summary)


def _report(summary: Summary) -> None:
    info = summary.info
    for warning in summary.warnings:
        typer.echo(f"warning: {warning}", err=True)
    rate = (info.samples + info.quarantined) / max(summary.seconds, 1e-9)
    splits = ", ".join(f"{name} {count}" for name, count in info.splits.items())
    typer.echo(
        f"{summary.out}: {info.samples} images ({splits}) in {len(info.shards)} shards, "
        f"{info.quarantined} quarantined, {rate:.0f} images/s"
    )
    for reason, count in sorted(summary.rejected.items()):
        typer.echo(f"  quarantined: {reason} {count}")
    for name in sorted(set(info.labels) - set(VOCABULARIES)):
        vocabulary = info.labels[name]
        shown = ", ".join(vocabulary.names[:12]) + (", ..." if len(vocabulary.names) > 12 else "")
        typer.echo(f"  label {name} ({len(vocabulary.names)} values, readable in the dataset): {shown}")
    unknown = info.patients.images_without
    if unknown and len(info.splits) > 1:
        typer.echo(f"  {unknown} images without a known patient, who may be in two splits (see --patient-pattern)")
    typer.echo(f"  private: {summary.private} links samples to files and patients; keep it where it is")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(help="The dataset.", show_default=False)],
) -> None:
    """Read every byte of a dataset and find what was changed, cut, lost, swapped or added. Exit code 1 if anything."""
    with _progress("shards") as on_progress:
        problems = verify(path, on_progress)
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        raise typer.Exit(1)
    info, sha256 = read_info(path)
    size = sum(shard.bytes for shard in info.shards)
    typer.echo(f"{path}: {info.samples} images in {len(info.shards)} shards, {size:,} bytes, nothing wrong; {sha256}")


@app.command("stats")
def stats_command(
    path: Annotated[Path, typer.Argument(help="The dataset.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show counts by split, class balance, patients, image sizes and bytes."""
    found = stats(Dataset.open(path))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console(file=sys.stdout)
    for table in _tables(found):
        console.print(table)


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    """The tables of `stats`, for people."""
    splits = list(found["splits"])
    overview = Table(title=escape(found["path"]), show_header=False)
    patients = found["patients"]
    for name, value in (
        ("images", f"{found['images']:,}"),
        ("quarantined", f"{found['quarantined']:,}"),
        ("patients", f"{patients['known']:,} (most images of one: {patients['most_images']})"),
        ("images without a patient", f"{patients['images_without']:,}"),
        *((side.replace("_", " "), "{min} / {median} / {max}".format(**found[side])) for side in _SIDES),
        ("bit depth, channels", f"{found['bit_depth']}, {found['channels']}"),
        ("mean, std of train", f"{found['mean']}, {found['std']}"),
        ("shards", f"{found['shards']:,} ({found['bytes']:,} bytes)"),
        ("sha256", found["sha256"]),
    ):
        overview.add_row(name, value)
    yield overview
    counts = Table("", *splits, title="split")
    counts.add_row("images", *(f"{found['splits'][split]:,}" for split in splits))
    counts.add_row("patients", *(f"{patients['by_split'][split]:,}" for split in splits))
    yield counts
    for name, values in found["labels"].items():
        table = Table("", *splits, title=f"label {escape(name)}")
        for value, by_split in values.items():
            shares = (f"{by_split[s]:,} ({by_split[s] / max(1, found['splits'][s]):.1%})" for s in splits)
            table.add_row(escape(value), *shares)
        yield table


_SIDES = ("height", "width", "shorter_side")
