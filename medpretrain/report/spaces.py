"""Descriptions of feature space: read, drawn and put into tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError
from medpretrain.evaluation import space_record
from medpretrain.evaluation.space_record import Picture as StoredPicture
from medpretrain.evaluation.space_record import Points, SpaceRecord
from medpretrain.report.drawing import PALETTE, Look, Picture, finished, legend_below, legend_height, panel, shortened
from medpretrain.report.tables import Cell, Column, Table, word

if TYPE_CHECKING:
    from medpretrain.report.gather import Method

SPACE_SUFFIX = space_record.SUFFIX
MOST_COLOURS = 12
"""Values of a label that have a colour of their own in a map; the rest are gray, and the caption says so."""
_MOST_POINTS = 6000
_UNKNOWN = "#c3c9ce"
# Twelve that are told apart on white: Okabe and Ito's, then darker ones of the same hues.
_COLOURS = (*PALETTE, "#000000", "#F0E442", "#7B3F00", "#00446b", "#7a2f63", "#00523b")
_NAMES = {"tsne": "t-SNE", "umap": "UMAP"}

# Field, column title, which way is good.
METRICS = (
    ("sad", "SAD", "low"),
    ("saa", "SAA", "high"),
    ("cad", "CAD", "low"),
    ("cac", "CAC", "high"),
    ("gpu", "GPU", "low"),
    ("alignment", "Alignment", "low"),
    ("uniformity", "Uniformity", "low"),
    ("rankme", "RankMe", "high"),
    ("feature_std", "Feature std", "high"),
)


@dataclass(frozen=True)
class Space:
    path: Path
    record: SpaceRecord
    points: Points

    def pixels(self, picture: StoredPicture) -> Path:
        return space_record.picture_path(self.path, picture)


def read_space(path: Path) -> Space:
    """
    Raises:
        UserError: as `space_record.read`, or a measure that is not finite.
    """
    record, points = space_record.read(path)
    for name, value in record.metrics.model_dump().items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{path} holds a value that is not finite: metrics.{name}; measure again")
    return Space(path, record, points)


Described = tuple["Method", Space]


def by_comparability(spaces: Iterable[Described]) -> list[list[Described]]:
    """Those of the same data and view together, in order of appearance."""
    found: dict[str, list[Described]] = {}
    for method, space in spaces:
        found.setdefault(space.record.comparable(), []).append((method, space))
    return list(found.values())


def metrics_table(spaces: Sequence[Described], look: Mapping[str, Look], name: str) -> Table:
    """A row a method."""
    data = spaces[0][1].record.data
    columns = [Column("Method", ("method",), numeric=False)]
    columns += [Column(f"{title} {'↓' if good == 'low' else '↑'}", (key,)) for key, title, good in METRICS]
    rows = []
    for method, space in spaces:
        values = space.record.metrics.model_dump()
        cells = [_measure(values[key]) for key, _, _ in METRICS]
        rows.append([word(method.name, look=look[method.name]), *cells])
    missing = [title for key, title, _ in METRICS if spaces[0][1].record.metrics.model_dump()[key] is None]
    notes = [
        "Arrows say which way is taken as better; these measures have no intervals, so nothing is marked as best.",
        "SAD, SAA: distance and accuracy of views of one image; CAD, CAC: the same of images of one class; GPU: "
        "Gaussian potential uniformity. RankMe and feature std are not comparable between widths of features.",
    ]
    if missing:
        notes.append(f"Not defined for one view an image: {', '.join(missing)}.")
    caption = f"Feature space of {data.n_images:,} images of {data.name}, split {data.split}, {data.label}"
    return Table(name, caption, columns, rows, notes)


def _measure(value: float | None) -> Cell:
    return (
        Cell("none", (None,))
        if value is None
        else Cell(f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}", (value,))
    )


def histogram_pictures(spaces: Sequence[Described], stem: str) -> list[Picture]:
    """Distances of views of one image, and of views of different images; a panel a method."""
    pictures = []
    for number, (method, space) in enumerate(spaces):
        found = space.record.histogram
        edges = np.array(found.edges)
        with panel(height=2.5) as (figure, axes):
            means = []
            for counts, mean, colour, label in (
                (found.positive, found.positive_mean, PALETTE[0], "views of one image"),
                (found.negative, found.negative_mean, PALETTE[1], "of different images"),
            ):
                total = sum(counts)
                if not total or mean is None:
                    continue
                density = np.array(counts) / (total * np.diff(edges))
                axes.stairs(density, edges, fill=True, color=colour, alpha=0.3, lw=0)
                axes.stairs(density, edges, color=colour, lw=1.2, label=f"{label}, mean {mean:.3g}")
                axes.axvline(mean, color=colour, lw=1, ls=(0, (2, 2)))
                means.append(f"{label} {mean:.3g} on average")
            axes.set(xlabel="Euclidean distance", ylabel="density", xlim=(edges[0], edges[-1]))
            axes.set_title(shortened(method.name, 30))
            axes.grid(False, axis="x")
            legend_below(figure, axes)
            pictures.append(
                finished(
                    figure,
                    f"{stem}-distances-{number}",
                    caption=f"{method.name}: distances between features as the backbone gives them; scales differ "
                    "between backbones",
                    alt=f"Histograms of distances of {method.name}: {', '.join(means)}",
                )
            )
    return pictures


def projection_pictures(spaces: Sequence[Described], stem: str) -> list[Picture]:
    """Maps of the images, for each method, technique and label one."""
    pictures = []
    own = spaces[0][1].record.data.label
    for number, (method, space) in enumerate(spaces):
        labels = space.points.labels
        for projection in space.record.projections:
            for place, label in enumerate([own, *(name for name in sorted(labels) if name != own)]):
                if label in labels:
                    file = f"{stem}-{projection.name}-{number}-{place}"
                    pictures.append(_map(method.name, space, projection.name, label, file))
    # By label first, so that the maps of one label stand together.
    return sorted(pictures, key=lambda picture: picture.choice != f"by {own}")


def _map(name: str, space: Space, technique: str, label: str, file: str) -> Picture:
    place = space.points.projections[technique]
    words = np.array([value if value is not None else "" for value in space.points.labels[label]])
    shown = np.isfinite(place).all(axis=1)
    chosen = np.flatnonzero(shown)
    if len(chosen) > _MOST_POINTS:
        chosen = chosen[np.linspace(0, len(chosen) - 1, _MOST_POINTS).astype(int)]
    values, counts = np.unique(words[words != ""], return_counts=True)
    ranked = values[np.argsort(-counts, kind="stable")][:MOST_COLOURS]
    known = set(ranked.tolist())
    order = np.random.default_rng(0).permutation(len(chosen))  # so that no class lies on top of another
    colours = dict(zip(sorted(known), _COLOURS, strict=False))
    points = chosen[order]
    title = _NAMES[technique]
    with panel(height=3.4 + legend_height([shortened(value, 22) for value in known] + ["other or unknown"])) as (
        figure,
        axes,
    ):
        face = [colours.get(words[at], _UNKNOWN) for at in points.tolist()]
        size = float(np.clip(9000 / max(1, len(points)), 3, 22))
        axes.scatter(place[points, 0], place[points, 1], c=face, s=size, lw=0, alpha=0.8, rasterized=True)
        for value, colour in colours.items():
            axes.scatter([], [], c=colour, s=16, label=shortened(value, 22))
        if len(known) < len(values) or (words[shown] == "").any():
            axes.scatter([], [], c=_UNKNOWN, s=16, label="other or unknown")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{shortened(name, 20)}, {title}")
        axes.grid(False)
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[["top", "right"]].set_visible(True)
        legend_below(figure, axes)
        rest = f" of {shown.sum():,}" if len(chosen) < shown.sum() else ""
        few = f"; the {MOST_COLOURS} largest of {len(values)} have a colour" if len(known) < len(values) else ""
        return finished(
            figure,
            file,
            caption=f"{name}: {title} of {len(chosen):,}{rest} images by {label}{few}; distances between groups and "
            "their sizes mean nothing",
            alt=f"{title} map of {name}: {len(chosen):,} points coloured by {label} ({', '.join(sorted(known))})",
            vector=False,
            choice=f"by {label}",
        )
