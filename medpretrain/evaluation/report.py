"""Show results beside those of a random backbone, and keep them as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from data_prep.errors import UserError
from medpretrain.evaluation.evaluate import Result

METRICS = ("accuracy", "auroc", "aupr")
_MUST_AGREE = ("protocol", "dataset_sha256", "label", "train_split", "test_split", "n_train", "n_test")


def table(pairs: Sequence[tuple[Result, Result]]) -> Table:
    """A row for each protocol and metric: the trained backbone, the random one, the difference.

    Args:
        pairs: (trained, random) of the same evaluation.

    Raises:
        UserError: the two of a pair were not measured on the same thing.
    """
    shown = Table(title="Frozen features, test split")
    for heading in ("protocol", "label", "images", "metric"):
        shown.add_column(heading)
    for heading in ("trained", "random", "difference"):
        shown.add_column(heading, justify="right")
    notes: list[str] = []
    for trained, random in pairs:
        differing = [name for name in _MUST_AGREE if getattr(trained, name) != getattr(random, name)]
        if differing:
            raise UserError(
                f"the trained and the random backbone differ in {', '.join(differing)}; compare like with like"
            )
        for metric in METRICS:
            first = metric == METRICS[0]
            ours, baseline = getattr(trained, metric), getattr(random, metric)
            shown.add_row(
                trained.protocol if first else "",
                trained.label if first else "",
                f"{trained.n_train} train, {trained.n_test} test" if first else "",
                metric,
                f"{ours:.4f}",
                f"{baseline:.4f}",
                f"{ours - baseline:+.4f}",
                end_section=metric == METRICS[-1],
            )
        notes.append(_note(trained))
        if not (trained.parameters.get("converged", True) and random.parameters.get("converged", True)):
            notes.append("the linear probe did not converge")
    shown.caption = "\n".join(dict.fromkeys(notes))
    return shown


def _note(result: Result) -> str:
    used = ", ".join(
        f"{name} {value}" for name, value in result.parameters.items() if name in ("k", "temperature", "C")
    )
    left_out = ", ".join(f"{count} of {split}" for split, count in result.excluded.items() if count)
    return f"{result.protocol}: {used}; " + (
        f"left out for want of a label: {left_out}" if left_out else "all labelled"
    )


def write_json(path: Path, results: Mapping[str, Sequence[Result]]) -> None:
    """Write {"trained": [...], "random": [...]} or the like; the file is whole or not there.

    Raises:
        UserError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} into")
    text = json.dumps({name: [one.model_dump() for one in group] for name, group in results.items()}, indent=2)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
