"""One table, written three times: HTML to read, CSV to compute with, LaTeX to print."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from medpretrain.report.drawing import Look

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """One column on the page, and one or several in the CSV file."""

    title: str
    names: tuple[str, ...]
    """In the CSV file."""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    text: str
    values: tuple[Value, ...]
    """For the CSV file, as exact as they are known: one for each of the column's names."""
    small: str = ""
    """Below or behind the text: an interval, a remark."""
    bold: bool = False
    look: Look | None = None
    """The method's colour, shown before the text."""


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        name: its files' names without ending; unique in a report.
        caption: a sentence.
        rows: of as many cells as there are columns.
        notes: sentences below it.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.columns), f"{self.name}: {len(row)} cells"
            for cell, column in zip(row, self.columns, strict=True):
                assert len(cell.values) == len(column.names), f"{self.name}: {column.title}"


def word(text: str, *, look: Look | None = None, bold: bool = False) -> Cell:
    """A cell of text."""
    return Cell(text, (text,), look=look, bold=bold)


def integer(value: int) -> Cell:
    return Cell(f"{value:,}", (value,))


def as_html(table: Table) -> str:
    """In a box of its own that scrolls where the page is narrower."""
    head = "".join(_heading(column) for column in table.columns)
    rows = "".join(f"<tr>{_row(table, row)}</tr>" for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<figure class="table"><figcaption>{escape(table.caption)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</figure>"
    )


def _heading(column: Column) -> str:
    return f'<th scope="col"{_class(column)}>{escape(column.title)}</th>'


def _class(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _row(table: Table, row: Sequence[Cell]) -> str:
    parts = []
    for place, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
        inside = escape(cell.text)
        if cell.bold:
            inside = f"<b>{inside}</b>"
        if cell.look is not None:
            inside = swatch(cell.look) + inside
        if cell.small:
            inside += f"<small>{escape(cell.small)}</small>"
        tag = 'th scope="row"' if place == 0 else "td"
        parts.append(f"<{tag}{_class(column)}>{inside}</{tag[:2]}>")
    return "".join(parts)


def swatch(look: Look) -> str:
    """A spot of a method's colour; nothing for those who read without seeing. By attribute, for the page's policy
    lets no style into the text."""
    return (
        f'<svg class="spot" viewBox="0 0 10 10" aria-hidden="true"><circle cx="5" cy="5" r="4.5" fill="{look.colour}"/>'
        "</svg>"
    )


def as_csv(table: Table) -> str:
    """Floats with all their digits; nothing where there is no value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([name for column in table.columns for name in column.names])
    for row in table.rows:
        writer.writerow([_plain(value) for cell in row for value in cell.values])
    return out.getvalue()


def _plain(value: Value) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def as_latex(table: Table) -> str:
    r"""A `table` with booktabs' rules; \label is `tab:` and the table's name."""
    columns = "".join("r" if column.numeric else "l" for column in table.columns)
    head = " & ".join(latex(column.title) for column in table.columns)
    rows = "\n".join(f"    {' & '.join(_latex_cell(cell) for cell in row)} \\\\" for row in table.rows)
    notes = "".join(f"\n  \\par\\smallskip\\footnotesize {latex(note)}" for note in table.notes)
    return (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{table}[t]\n"
        "  \\centering\n"
        f"  \\caption{{{latex(table.caption)}}}\n"
        f"  \\label{{tab:{table.name}}}\n"
        f"  \\begin{{tabular}}{{{columns}}}\n"
        "    \\toprule\n"
        f"    {head} \\\\\n"
        "    \\midrule\n"
        f"{rows}\n"
        "    \\bottomrule\n"
        f"  \\end{{tabular}}{notes}\n"
        "\\end{table}\n"
    )


def _latex_cell(cell: Cell) -> str:
    text = latex(cell.text)
    text = f"\\textbf{{{text}}}" if cell.bold else text
    return f"{text} {{\\scriptsize {latex(cell.small)}}}" if cell.small else text


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{EN DASH}": "--",
    "…": r"\dots{}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "≤": r"$\le$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
    '"': "''",
}


def latex(text: str) -> str:
    r"""Text as LaTeX prints it.

    >>> print(latex("95 % of a_b & c^2"))
    95 \% of a\_b \& c\textasciicircum{}2
    """
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))
