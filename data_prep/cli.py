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

from data_prep.dataset import Dataset
from data_prep.dicom.pseudonyms import write_key
from data_prep.images import Images
from data_prep.labels import VOCABULARIES
from data_prep.options import SHARD_SIZE, Options, Running, parse_part
from data_prep.plan import parse_split
from data_prep.prepare import Kind, Summary, Unfinished, prepare
from data_prep.progress import progress
from data_prep.stats import stats
from data_prep.verify import verify

app = typer.Typer(help="Turn images into a checked, de-identified dataset of shards.", no_args_is_help=True)


# Options that every kind of source knows

Out = Annotated[
    str, typer.Argument(help="The dataset: a folder, or a URL such as s3://bucket/folder.", show_default=False)
]
Split = Annotated[
    str | None, typer.Option(help="Split by patient (by image where unknown): train=0.8,val=0.1,test=0.1.")
]
Seed = Annotated[
    int,
    typer.Option(help="Of shuffle, split and numbers of patients. Keep yours secret where ids can be guessed."),
]
ShardSize = Annotated[int, typer.Option(help="The most images in a shard.")]
Duplicates = Annotated[str, typer.Option(help="What to find: off, exact (the same pixels), near (about the same too).")]
DropDuplicates = Annotated[
    bool,
    typer.Option("--drop-duplicates", help="Keep one of the images that are the same; quarantine the others."),
]
Resize = Annotated[
    int | None, typer.Option(help="Shrink larger images to this shorter side, in pixels; they are re-encoded.")
]
KeyFile = Annotated[
    Path | None, typer.Option(help="Key of the patients' pseudonyms: at least 32 random bytes, see 'prep key'.")
]
Workers = Annotated[int, typer.Option(help="Processes. The result does not depend on it.")]
Cluster = Annotated[
    str | None, typer.Option(help="A Dask scheduler, tcp://host:port, whose workers see SOURCE and OUT.")
]
Part = Annotated[
    str | None, typer.Option(help="Do one part of n, as 3/8; the part that ends last finishes. For job arrays.")
]
Private = Annotated[Path | None, typer.Option(help="Where the link table goes, OUT.private if not given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a dataset in OUT, and forget an unfinished run.")]
Append = Annotated[bool, typer.Option("--append", help="Add what is new in SOURCE to the dataset, as new shards.")]


def _prepare(kind: Kind, out: str, options: Options, part: str | None, **running: Any) -> None:
    """Run one kind of preparation and say what came of it."""
    with progress() as on_progress:
        result = prepare(kind, out, options, Running(part=parse_part(part), on_progress=on_progress, **running))
    if isinstance(result, Unfinished):
        typer.echo(f"{result.out}: this part is done; {result.left} shards of other parts are still to be written")
        return
    _report(result)


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
    out: Out,
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
    trust_images: Annotated[
        bool, typer.Option("--trust-images", help="Read headers only: much faster, but damaged pixels pass.")
    ] = False,
    resize: Resize = None,
    key_file: KeyFile = None,
    split: Split = None,
    seed: Seed = 0,
    shard_size: ShardSize = SHARD_SIZE,
    duplicates: Duplicates = "near",
    drop_duplicates: DropDuplicates = False,
    workers: Workers = 1,
    cluster: Cluster = None,
    part: Part = None,
    private: Private = None,
    overwrite: Overwrite = False,
    append: Append = False,
) -> None:
    """Pack images into shards, checked and without metadata.

    File names, patient ids, EXIF, comments and text chunks do not enter the dataset; burned-in text and the names of
    classes do. Damaged images are left out, with the reason in quarantine.parquet.
    """
    if no_labels and label_column:
        raise typer.BadParameter("--no-labels and --label-column exclude each other")
    chosen: list[str] | None = [] if no_labels else (label_column or None)
    kind = Images(source, labels, chosen, patient_pattern, resize, trust_images, key_file)
    options = Options(parse_split(split), seed, shard_size, duplicates, drop_duplicates)
    how = {"workers": workers, "cluster": cluster, "private": private, "overwrite": overwrite, "append": append}
    _prepare(kind, out, options, part, **how)


def _report(summary: Summary) -> None:
    info = summary.info
    for warning in summary.warnings:
        typer.echo(f"warning: {warning}", err=True)
    rate = info.sources / max(summary.seconds, 1e-9)
    splits = ", ".join(f"{name} {count}" for name, count in info.splits.items())
    typer.echo(
        f"{summary.out}: {info.samples} images ({splits}) in {len(info.shards)} shards, "
        f"{info.quarantined} quarantined, {rate:.0f} sources/s"
    )
    for reason, count in info.reasons.items():
        typer.echo(f"  quarantined: {reason} {count}")
    for name in sorted(set(info.labels) - set(VOCABULARIES)):
        vocabulary = info.labels[name]
        shown = ", ".join(vocabulary.names[:12]) + (", ..." if len(vocabulary.names) > 12 else "")
        typer.echo(f"  label {name} ({len(vocabulary.names)} values, readable in the dataset): {shown}")
    unknown = info.patients.images_without
    if unknown and len(info.splits) > 1:
        typer.echo(f"  {unknown} images without a known patient, who may be in two splits (see --patient-pattern)")
    typer.echo(f"  private: {summary.private} links samples to files and patients; keep it where it is")


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
