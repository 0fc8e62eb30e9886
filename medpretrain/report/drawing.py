"""How a report's figures look, and how one becomes files that are the same for the same numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from medpretrain.report.gather import Material

# Okabe and Ito's colours, told apart by colour-blind readers, the yellow left out, which is too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
UNTRAINED = "#6B6B6B"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, SOFT, FAINT = "#222222", "#5a6670", "#dfe3e6"
WIDTH = 3.6
"""Inches of a panel: 346 px of a browser, what a phone of 390 px has room for; text is then read at its own size."""
_DPI = 200
_SHORT_NAME = 20
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa4ac",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.color": INK,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "medpretrain report",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """One panel.

    Attributes:
        name: its files' names without ending; unique in a report.
        caption: what is under it, a sentence.
        alt: what it shows, for those who cannot see it.
        png, svg: its files; no SVG where it is made of pixels.
        shows_patients: images of patients are in it.
        wide: it takes the width of two.
        choice: what it is chosen by, where one of several is looked at at a time.
    """

    name: str
    caption: str
    alt: str
    png: bytes
    svg: bytes | None = None
    shows_patients: bool = False
    wide: bool = False
    choice: str = ""


@dataclass(frozen=True)
class Look:
    """A method's colour, line and marker: the same in every figure and beside its name in every table."""

    colour: str
    dash: Any
    marker: str


def looks(
    names: Sequence[str], untrained: Collection[str] = (), families: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Look]:
    """By method; six colours, then the same ones with other lines. What is untrained is gray; the pretrainings of one
    recipe have its colour, each with a line of its own."""
    member_of = {member: (family, place) for family, members in (families or {}).items() for place, member in
                 enumerate(members)}  # fmt: skip
    found: dict[str, Look] = {}
    trained = gray = 0
    for name in names:
        if name in untrained and name not in member_of:
            gray += 1
            found[name] = Look(UNTRAINED, DASHES[gray % len(DASHES)], "x")
        elif name not in member_of:
            turn, place = divmod(trained, len(PALETTE))
            found[name] = Look(PALETTE[place], DASHES[turn % len(DASHES)], MARKERS[(place + turn) % len(MARKERS)])
            trained += 1
    for name, (family, place) in member_of.items():
        found[name] = Look(found[family].colour, DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)])
    return found


def method_looks(material: Material) -> dict[str, Look]:
    """Of all methods, and of runs that no evaluation is of."""
    names = [method.name for method in material.methods]
    untrained = [method.name for method in material.methods if method.source.kind == "random"]
    others = [run.name for run in material.runs if run.name not in names]
    return looks([*names, *others], untrained, material.families)


@contextmanager
def panel(width: float = WIDTH, height: float = 2.75) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, in the report's style."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure without axes, in the report's style."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def finished(
    figure: Figure,
    name: str,
    *,
    caption: str,
    alt: str,
    vector: bool = True,
    shows_patients: bool = False,
    wide: bool = False,
    choice: str = "",
) -> Picture:
    """The figure's files. Without dates and versions: the same numbers give the same bytes."""
    raw, drawn = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI, metadata={"Software": None})
    figure.set_layout_engine("none")  # found for the first file, and good for the second
    if vector:
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(drawn, format="svg", metadata=metadata)
    return Picture(
        name, caption, alt, small_png(raw.getvalue()), drawn.getvalue() or None, shows_patients, wide, choice
    )


def small_png(raw: bytes, colours: int = 255) -> bytes:
    """A PNG with a palette: a third of the bytes, and no difference that is seen."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(raw)) as image:
        image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def legend_below(figure: Figure, axes: Axes) -> None:
    """A legend under the axes, where it hides nothing; in two columns where names are short."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=legend_columns(labels))


def legend_columns(labels: Sequence[str]) -> int:
    return 2 if len(labels) > 1 and max(map(len, labels)) <= _SHORT_NAME else 1


def legend_height(labels: Sequence[str]) -> float:
    """Inches that `legend_below` takes."""
    return 0.17 * math.ceil(len(labels) / legend_columns(labels)) if labels else 0.0


def shortened(text: str, most: int = 22) -> str:
    """A name that fits an axis.

    >>> shortened("malignant melanoma of the skin", 12)
    'malignant m…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"
