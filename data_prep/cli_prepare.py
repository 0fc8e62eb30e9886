"""The commands of `medpretrain prep` that make a dataset, one a kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError
from data_prep.images import Images
from data_prep.labels import VOCABULARIES
from data_prep.options import SHARD_SIZE, Options, Running, parse_part
from data_prep.pictures import RadImageNetSource, Retina
from data_prep.plan import parse_split
from data_prep.prepare import Kind, Summary, Unfinished, check, prepare
from data_prep.progress import progress
from data_prep.retina import RetinaSettings

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
    str, typer.Option(help="What to take out: off, exact (one of each stays), near (look-alikes across splits too).")
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
Labels = Annotated[
    str | None, typer.Option(help="Modality and anatomy by class: a YAML file, or mednist, fundus, breastmnist.")
]
LabelColumn = Annotated[list[str] | None, typer.Option(help="Keep this label column only; may be given several times.")]
NoLabels = Annotated[
    bool, typer.Option("--no-labels", help="Folders or columns are no labels; use it where they name patients.")
]
PatientPattern = Annotated[
    str | None,
    typer.Option(help=r"Regular expression; its group 1 in an image's path is the patient: '(\d+)_(?:left|right)'."),
]
TrustImages = Annotated[
    bool, typer.Option("--trust-images", help="Read headers only: much faster, but damaged pixels pass.")
]
_USABLE = RetinaSettings()


def _chosen(label_column: list[str] | None, no_labels: bool) -> list[str] | None:
    if no_labels and label_column:
        raise typer.BadParameter("--no-labels and --label-column exclude each other")
    return [] if no_labels else (label_column or None)


@dataclass(frozen=True)
class Preparation:
    """What a command line asks for; the commands below make one, so that a launcher can have it checked only."""

    kind: Kind
    out: str
    options: Options
    running: Running

    def check(self) -> None:
        """
        Raises:
            UserError: it would be refused wherever it runs.
        """
        check(self.out, self.options, self.running)

    def run(self) -> None:
        """Prepare, and say what came of it."""
        with progress() as on_progress:
            result = prepare(self.kind, self.out, self.options, replace(self.running, on_progress=on_progress))
        if isinstance(result, Unfinished):
            typer.echo(f"{result.out}: this part is done; {result.left} shards of other parts are still to be written")
            return
        _report(result)


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
    labels: Labels = None,
    label_column: LabelColumn = None,
    no_labels: NoLabels = False,
    patient_pattern: PatientPattern = None,
    trust_images: TrustImages = False,
    resize: Resize = None,
    key_file: KeyFile = None,
    split: Split = None,
    seed: Seed = 0,
    shard_size: ShardSize = SHARD_SIZE,
    duplicates: Duplicates = "near",
    drop_duplicates: DropDuplicates = "off",
    workers: Workers = 1,
    cluster: Cluster = None,
    part: Part = None,
    private: Private = None,
    overwrite: Overwrite = False,
    append: Append = False,
) -> Preparation:
    """Pack images into shards, checked and without metadata.

    File names, patient ids, EXIF, comments and text chunks do not enter the dataset; burned-in text and the names of
    classes do. Damaged images are left out, with the reason in quarantine.parquet.
    """
    chosen = _chosen(label_column, no_labels)
    kind = Images(source, labels, chosen, patient_pattern, resize, trust_images, key_file)
    options = Options(parse_split(split), seed, shard_size, duplicates, drop_duplicates)
    running = Running(workers, None, cluster, parse_part(part), overwrite, append, private)
    return Preparation(kind, out, options, running)


def dicom_command(
    source: Annotated[
        Path, typer.Argument(help="A PACS export: a folder, a .zip, a DICOMDIR or one file.", show_default=False)
    ],
    out: Out,
    key_file: KeyFile = None,
    profile: Annotated[
        str, typer.Option(help="What leaves: strict, strict_demographics, or the path of a .yaml file.")
    ] = "strict",
    anatomy: Annotated[
        Path | None, typer.Option(help="Your table of anatomies (.yaml), asked where the header says nothing.")
    ] = None,
    reviewed: Annotated[
        Path | None, typer.Option(help="CSV with a column 'instance': pseudonyms that a human has approved.")
    ] = None,
    window: Annotated[
        str, typer.Option(help="stored, percentile[:LOW,HIGH], or fixed[:TABLE.yaml]: Hounsfield windows by anatomy.")
    ] = "stored",
    bits: Annotated[int, typer.Option(help="8, or 16 for gray images alone.")] = 8,
    image_format: Annotated[str, typer.Option("--format", help="png or jpg.")] = "png",
    resize: Resize = None,
    split: Split = None,
    seed: Seed = 0,
    shard_size: ShardSize = SHARD_SIZE,
    duplicates: Duplicates = "near",
    drop_duplicates: DropDuplicates = "off",
    workers: Workers = 1,
    cluster: Cluster = None,
    part: Part = None,
    private: Private = None,
    overwrite: Overwrite = False,
    append: Append = False,
) -> Preparation:
    """De-identify a PACS export and pack its images into shards.

    Pixels and a short list of attributes leave, nothing else; patients, studies, series and instances become keyed
    hashes. What may show who the patient is goes to quarantine; see it with 'prep review'. No tool finds everything:
    look before you share.
    """
    from data_prep.dicom.source import Dicom  # pydicom and its decoders take seconds to load

    if key_file is None:
        raise UserError("prep dicom makes pseudonyms with a key: give --key-file, or make one with 'prep key FILE'")
    kind = Dicom(source, key_file, profile, anatomy, reviewed, window, bits, image_format, resize)  # type: ignore[arg-type]
    options = Options(parse_split(split), seed, shard_size, duplicates, drop_duplicates)
    running = Running(workers, None, cluster, parse_part(part), overwrite, append, private)
    return Preparation(kind, out, options, running)


def radimagenet_command(
    source: Annotated[
        Path, typer.Argument(help="The folder with RadiologyAI_{train,val,test}.csv.", show_default=False)
    ],
    out: Out,
    ultrasound: Annotated[
        Path | None, typer.Option(help="Your labels file (.yaml) with the anatomy of ultrasound classes.")
    ] = None,
    trust_images: TrustImages = False,
    resize: Resize = None,
    seed: Seed = 0,
    shard_size: ShardSize = SHARD_SIZE,
    duplicates: Duplicates = "near",
    drop_duplicates: DropDuplicates = "off",
    workers: Workers = 1,
    cluster: Cluster = None,
    part: Part = None,
    private: Private = None,
    overwrite: Overwrite = False,
    append: Append = False,
) -> Preparation:
    """Pack RadImageNet as published, with its own split, into shards with modality and anatomy."""
    kind = RadImageNetSource(source, ultrasound, resize, trust_images)
    options = Options(None, seed, shard_size, duplicates, drop_duplicates)
    running = Running(workers, None, cluster, parse_part(part), overwrite, append, private)
    return Preparation(kind, out, options, running)


def retina_command(
    source: Annotated[
        Path, typer.Argument(help="A folder or manifest of photographs, as for 'prep images'.", show_default=False)
    ],
    out: Out,
    labels: Labels = None,
    label_column: LabelColumn = None,
    no_labels: NoLabels = False,
    patient_pattern: PatientPattern = None,
    min_sharpness: Annotated[float, typer.Option(help="Below it a photograph is blurred.")] = _USABLE.min_sharpness,
    min_field: Annotated[float, typer.Option(help="Share of the disc that must be in the frame.")] = _USABLE.min_field,
    max_dark: Annotated[float, typer.Option(help="Share of the disc that may be too dark.")] = _USABLE.max_dark,
    max_bright: Annotated[float, typer.Option(help="Share of the disc that may be overexposed.")] = _USABLE.max_bright,
    resize: Resize = None,
    key_file: KeyFile = None,
    split: Split = None,
    seed: Seed = 0,
    shard_size: ShardSize = SHARD_SIZE,
    duplicates: Duplicates = "near",
    drop_duplicates: DropDuplicates = "off",
    workers: Workers = 1,
    cluster: Cluster = None,
    part: Part = None,
    private: Private = None,
    overwrite: Overwrite = False,
    append: Append = False,
) -> Preparation:
    """Cut retinal photographs to the field of view, set unusable ones aside, and pack the rest into shards."""
    settings = RetinaSettings(
        min_sharpness=min_sharpness, min_field=min_field, max_dark=max_dark, max_bright=max_bright
    )
    chosen = _chosen(label_column, no_labels)
    kind = Retina(source, labels, chosen, patient_pattern, resize, False, key_file, settings)
    options = Options(parse_split(split), seed, shard_size, duplicates, drop_duplicates)
    running = Running(workers, None, cluster, parse_part(part), overwrite, append, private)
    return Preparation(kind, out, options, running)


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


COMMANDS: dict[str, Callable[..., Preparation]] = {
    "dicom": dicom_command,
    "radimagenet": radimagenet_command,
    "retina": retina_command,
    "images": images_command,
}
