"""`medpretrain prep`: from pictures to shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.cli_prepare import COMMANDS, Out, Preparation, Workers
from data_prep.dataset import Dataset
from data_prep.dicom.pseudonyms import write_key
from data_prep.progress import progress
from data_prep.stats import stats
from data_prep.verify import verify


def _run(asked: Preparation | None) -> None:
    """What the command gave back: those of `COMMANDS` do nothing themselves."""
    if asked is not None:
        asked.run()


app = typer.Typer(
    help="Turn images into a checked, de-identified dataset of shards.", no_args_is_help=True, result_callback=_run
)

for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.command("key")
def key_command(path: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)]) -> None:
    """Make a key for pseudonyms: keep it secret and safe; with another key the same patients get other names."""
    write_key(path)
    typer.echo(f"{path}: a new key, readable by you alone")


@app.command("verify")
def verify_command(
    path: Out,
    quick: Annotated[bool, typer.Option("--quick", help="Do not decode images, nor try other readers.")] = False,
    workers: Workers = 1,
) -> None:
    """Prove that a dataset is whole and what it says of itself. Exit code 1 if anything is wrong.

    Every byte is compared with its hash, every row with its image, every image is decoded, and webdataset and DALI read
    every shard. No patient, study, series or image may be in two splits.
    """
    with progress() as report:
        findings = verify(path, quick=quick, workers=workers, on_progress=report)
    for line in (*findings, *findings.notes):
        typer.echo(str(line))
    if findings:
        raise typer.Exit(1)
    info = findings.info
    assert info is not None
    size = sum(shard.bytes for shard in info.shards)
    typer.echo(
        f"{path}: {info.samples} images in {len(info.shards)} shards, {size:,} bytes, nothing wrong; {findings.sha256}"
    )


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


@app.command("review")
def review_command(
    out: Annotated[str, typer.Argument(help="The dataset, a folder or a URL.", show_default=False)],
    images: Annotated[int, typer.Option(help="The most pictures of kept images, and of each reason.")] = 200,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 0,
    private: Annotated[
        Path | None, typer.Option(help="Where the link table is, OUT.private if not given; needed for a URL.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="The page, review.html beside the link table if not given.")] = None,
) -> None:
    """Write a page of what was kept and what was set aside, for a human to sign before the dataset leaves.

    It shows pictures of what was set aside, names in them too, so it is private. Burned-in text that is none can be
    approved there: the page saves a reviewed.csv for 'prep dicom --reviewed'.
    """
    from data_prep.review import review  # it loads pydicom and its decoders, which takes seconds

    found = review(out, private, html, images, seed)
    typer.echo(
        f"{found.path}: {found.kept} kept images, {found.set_aside} set aside, of which a human may approve "
        f"{found.liftable}; it may show names, so keep it where it is"
    )


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
