"""What goes into a report: its sections as HTML, and the figures and tables that also become files."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from medpretrain.report.drawing import Look, Picture
from medpretrain.report.tables import Table, as_html, swatch


@dataclass
class Book:
    """Collects figures and tables as they are put on the page.

    Attributes:
        images: whether images of patients may be shown.
    """

    images: bool = True
    pictures: dict[str, Picture] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    shows_patients: bool = False

    def table(self, table: Table) -> str:
        assert table.name not in self.tables, table.name
        self.tables[table.name] = table
        files = _files("tables", table.name, ("csv", "tex"))
        return as_html(table).replace("</figcaption>", f"{files}</figcaption>", 1)

    def panels(self, pictures: Sequence[Picture], *, kind: str = "", choose: str = "", first: str = "") -> str:
        """Figures side by side, as many as fit.

        Args:
            kind: `small` for many little ones, `few` where they need not fill the width.
            choose: what the buttons over them choose, by `Picture.choice`.
            first: `all` to begin with all of them.
        """
        shown = [picture for picture in pictures if self.images or not picture.shows_patients]
        if not shown:
            return ""
        kind = kind or ("few" if len(shown) < 3 else "four" if len(shown) in (4, 7, 8) else "")
        asked = f' data-choose="{escape(choose)}" data-first="{first}"' if choose else ""
        return f'<div class="panels {kind}"{asked}>{"".join(map(self._panel, shown))}</div>'

    def _panel(self, picture: Picture) -> str:
        assert picture.name not in self.pictures, picture.name
        self.pictures[picture.name] = picture
        self.shows_patients |= picture.shows_patients
        wide = " wide" if picture.wide else ""
        choice = f' data-choice="{escape(picture.choice)}"' if picture.choice else ""
        endings = ("png", "svg") if picture.svg else ("png",)
        return (
            f'<figure class="panel{wide}"{choice}><img alt="{escape(picture.alt)}" src="{_source(picture)}">'
            f"<figcaption>{escape(picture.caption)}{_files('figures', picture.name, endings)}</figcaption></figure>"
        )

    def thumbnail(self, png: bytes, alt: str, caption: str, kind: str = "") -> str:
        """A small image of a patient in a strip."""
        assert self.images
        self.shows_patients = True
        return (
            f'<figure class="{kind}"><img alt="{escape(alt)}" src="data:image/png;base64,{_base64(png)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def _source(picture: Picture) -> str:
    """The smaller of the two files; the drawn one is sharp at every size."""
    if picture.svg and len(picture.svg) < 1.3 * len(picture.png):
        return f"data:image/svg+xml;base64,{_base64(picture.svg)}"
    return f"data:image/png;base64,{_base64(picture.png)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _files(folder: str, name: str, endings: Iterable[str]) -> str:
    links = "".join(f'<a href="{folder}/{name}.{ending}">{ending}</a>' for ending in endings)
    return f'<span class="files">{links}</span>'


def paragraph(text: str, kind: str = "") -> str:
    """Text; what stands between backticks is a command."""
    inside = re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))
    return f'<p class="{kind}">{inside}</p>' if kind else f"<p>{inside}</p>"


def absent(text: str) -> str:
    """What is missing, and why."""
    return paragraph(text, "absent")


def heading(level: int, text: str, id: str = "") -> str:
    return f'<h{level} id="{id}">{escape(text)}</h{level}>' if id else f"<h{level}>{escape(text)}</h{level}>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms and what they are, both text."""
    return (
        '<dl class="facts">'
        + "".join(f"<dt>{escape(term)}</dt><dd>{escape(said)}</dd>" for term, said in pairs)
        + "</dl>"
    )


def bullets(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def strip(figures: Sequence[str], label: str) -> str:
    """Small images in a row that scrolls."""
    return f'<div class="strip" tabindex="0" role="region" aria-label="{escape(label)}">{"".join(figures)}</div>'


def card(title: str, look: Look, inside: Sequence[str]) -> str:
    """A box under a method's name and colour."""
    return f'<div class="card"><h5>{swatch(look)}{escape(title)}</h5>{"".join(inside)}</div>'
