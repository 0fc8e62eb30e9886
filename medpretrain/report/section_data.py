"""The parts of the page on where numbers come from: the methods, and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from data_prep.dataset_info import DatasetInfo
from medpretrain.evaluation.results import SETTING, DataRecord, Value
from medpretrain.report.book import absent, bullets, facts, heading
from medpretrain.report.drawing import Look
from medpretrain.report.gather import Material
from medpretrain.report.tables import Cell, Column, Table, word
from medpretrain.report.views import Reach

_KINDS = {"run": "pretrained here", "export": "export", "timm": "timm's weights", "random": "not trained"}


def methods_table(material: Material, look: Mapping[str, Look]) -> Table:
    """A row a backbone: what is known of where its weights come from."""
    columns = [
        Column("Method", ("method",), numeric=False),
        Column("Kind", ("kind",), numeric=False),
        Column("Architecture", ("architecture",), numeric=False),
        Column("Where it comes from", ("about",), numeric=False),
        Column("SHA-256", ("sha256",), numeric=False),
    ]
    rows = []
    for method in material.methods:
        source = method.source
        about = "; ".join(
            f"{key.replace('_', ' ').replace('sha256', 'SHA-256')} {plain(value)}"
            for key, value in source.about.items()
            if value is not None and key != SETTING
        )
        rows.append(
            [
                word(method.name, look=look[method.name]),
                Cell(_KINDS[source.kind], (source.kind,)),
                word(source.architecture),
                word(about or "nothing more is known"),
                Cell(source.sha256[:12], (source.sha256,)),
            ]
        )
    return Table("methods", "What was compared", columns, rows)


def plain(value: Value) -> str:
    """A value without a path, and a hash no longer than it is looked at.

    >>> plain("/data/runs/simclr"), plain(7)
    ('simclr', '7')
    """
    text = str(value)
    if "/" in text and " " not in text:
        text = PurePath(text).name
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def data_section(material: Material, reach: Reach) -> str:
    """Every dataset: those evaluated on, and those pretrained on where they are within reach."""
    parts = []
    records: dict[str, list[DataRecord]] = {}
    for group in material.groups:
        records.setdefault(group.first.data.sha256, []).append(group.first.data)
    infos = _infos(reach)
    seen = {*records, *infos}
    for sha256, found in records.items():
        parts.append(heading(3, f"{found[0].name}: evaluated on"))
        parts.append(facts(_recorded(found)))
        made = infos.pop(sha256, None)
        parts.append(
            _made(made[1]) if made else absent("How it was made is not known here: the dataset is out of reach.")
        )
    for sha256, (name, info) in infos.items():
        parts.append(heading(3, f"{name}: pretrained on"))
        parts.append(facts([("SHA-256", sha256)]) + _made(info))
    for run in material.runs:
        for sha256 in run.datasets:
            if sha256 not in seen:
                parts.append(heading(3, f"Pretrained on by {run.name}"))
                parts.append(facts([("SHA-256", sha256)]) + absent("Nothing more is known: it is out of reach."))
                seen.add(sha256)
        if not run.datasets:
            parts.append(absent(f"{run.name} did not write down which data it was trained on."))
    return "".join(parts)


def _infos(reach: Reach) -> dict[str, tuple[str, DatasetInfo]]:
    found: dict[str, tuple[str, DatasetInfo]] = {}
    for mixture in reach.values():
        if not isinstance(mixture, str):
            for dataset in mixture.datasets:
                found.setdefault(dataset.sha256, (dataset.path.name, dataset.info))
    return found


def _recorded(found: Sequence[DataRecord]) -> list[tuple[str, str]]:
    first = found[0]
    pairs = [("SHA-256", first.sha256), ("Patients", first.patients)]
    for data in {one.model_dump_json(): one for one in found}.values():
        counts = ", ".join(
            f"{name} {train:,} / {test:,}"
            for name, train, test in zip(data.classes, data.train_counts, data.test_counts, strict=True)
        )
        pairs.append((f"Label {data.label}, {data.train_split} / {data.test_split}", counts))
        left = ", ".join(f"{n:,} of {split}" for split, n in data.left_out.items() if n)
        pairs.append((f"Images without {data.label}", left or "none"))
        if data.test_sha256 != data.sha256:
            pairs.append(("Tested on another dataset", f"{data.test_name}, SHA-256 {data.test_sha256}"))
    return pairs


def _made(info: DatasetInfo) -> str:
    patients = f"{info.patients.known:,} known"
    if info.patients.images_without:
        patients += f"; {info.patients.images_without:,} images without a known patient"
    dropped = info.duplicates
    size = sum(shard.bytes for shard in info.shards)
    pairs = [
        ("Images", f"{info.samples:,}, {info.bit_depth} bit, {'gray' if info.channels == 1 else 'colour or gray'}; "
                   f"{size / 2**20:,.1f} MiB in {len(info.shards):,} shards"),
        ("Splits", ", ".join(f"{name} {n:,}" for name, n in info.splits.items())),
        ("Patients", patients),
        ("Set aside", f"{info.quarantined:,}" + (
            f": {', '.join(f'{reason} {n:,}' for reason, n in info.reasons.items())}" if info.reasons else "")),
        ("Duplicates", f"looked for: {dropped.kind}; dropped: {dropped.dropped:,}"),
        ("De-identification", f"profile {info.deidentification.profile}" if info.deidentification
         else "no profile: these are no DICOM files"),
        ("Made by", info.created_by),
    ]  # fmt: skip
    options = [f"{name}: {plain_json(value)}" for name, value in info.options.items()]
    return facts(pairs) + f"<details><summary>Options it was made with</summary>{bullets(options)}</details>"


def plain_json(value: object) -> str:
    return plain(value) if isinstance(value, str) else json.dumps(value)
