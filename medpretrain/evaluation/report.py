"""Show results beside those of a random backbone, and keep them as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from data_prep.errors import UserError
from medpretrain.evaluation.evaluate import Result

METRICS = ("accuracy", "auroc", "aupr")
_MUST_AGREE = ("protocol", "dataset_sha256", "label", "train_split", "test_split", "n_train", "n_test")


def table(trained: Result, random: Result | None = None) -> Table:
    """A row a metric: the trained backbone and, where there is one, the random one and the difference.

    Raises:
        UserError: the two were not measured on the same thing.
    """
    differing = [name for name in _MUST_AGREE if random and getattr(trained, name) != getattr(random, name)]
    if differing:
        raise UserError(f"the trained and the random backbone differ in {', '.join(differing)}; compare like with like")
    shown = Table(title=f"{trained.protocol} on frozen features, label {trained.label!r}")
    shown.add_column(f"{trained.n_train} train, {trained.n_test} test images")
    for heading in ("trained", "random", "difference") if random else ("trained",):
        shown.add_column(heading, justify="right")
    for metric in METRICS:
        ours = getattr(trained, metric)
        against = [f"{getattr(random, metric):.4f}", f"{ours - getattr(random, metric):+.4f}"] if random else []
        shown.add_row(metric, f"{ours:.4f}", *against)
    notes = [_note(trained)]
    if not all(result.parameters.get("converged", True) for result in (trained, random) if result):
        notes.append("the linear probe did not converge")
    shown.caption = "\n".join(notes)
    return shown


def _note(result: Result) -> str:
    used = ", ".join(
        f"{name} {value}" for name, value in result.parameters.items() if name in ("k", "temperature", "C")
    )
    left_out = ", ".join(f"{count} of {split}" for split, count in result.excluded.items() if count)
    return f"{result.protocol}: {used}; " + (
        f"left out for want of a label: {left_out}" if left_out else "all labelled"
    )


def write_json(path: Path, results: Mapping[str, Result], about: Mapping[str, str | int]) -> None:
    """Write the results by name, `trained` and perhaps `random`, and `about`; the file is whole or not there.

    Args:
        about: which run and checkpoint was measured.

    Raises:
        UserError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} into")
    text = json.dumps({"about": dict(about), **{name: one.model_dump() for name, one in results.items()}}, indent=2)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
