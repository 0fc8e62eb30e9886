"""One table, three forms: nothing is lost, and nothing gets out of its cell."""

from __future__ import annotations

import csv
import io
import re

from medpretrain.report.tables import Cell, Column, Table, as_csv, as_html, as_latex, latex

NASTY = 'a_b & 50% <i>"x"</i> #1 {y} ~ ^ \\ $'
TABLE = Table(
    "nasty",
    f"caption {NASTY}",
    [Column("Name", ("name",), numeric=False), Column("Value", ("value", "low"))],
    [
        [Cell(NASTY, (NASTY,), bold=True), Cell("0.123", (0.1 + 0.2, None), "small & fine")],
        [Cell("two", ("two",)), Cell("1", (1.0, 2.0))],
    ],
    [f"note {NASTY}"],
)


def test_csv_gives_back_every_digit_and_nothing_for_what_is_not_known():
    rows = list(csv.DictReader(io.StringIO(as_csv(TABLE))))
    assert rows[0]["name"] == NASTY
    assert float(rows[0]["value"]) == 0.1 + 0.2
    assert rows[0]["low"] == ""
    assert [float(rows[1][key]) for key in ("value", "low")] == [1.0, 2.0]


def test_html_escapes_what_is_in_cells_captions_and_notes():
    text = as_html(TABLE)
    assert "<i>" not in text
    assert text.count("&lt;i&gt;") == 4  # caption, its label for those who do not see it, cell and note
    assert '<td class="number">' in text


def balanced(text: str) -> bool:
    depth = 0
    for mark in re.findall(r"(?<!\\)[{}]", text.replace("\\\\", "")):
        depth += 1 if mark == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def test_latex_is_balanced_and_every_row_has_its_columns():
    text = as_latex(TABLE)
    assert balanced(text)
    assert text.count("\\begin") == text.count("\\end") == 2
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [1, 1]
    for letter in "&%#_$":
        assert not re.search(rf"(?<!\\)\{letter}", latex(NASTY)), letter
