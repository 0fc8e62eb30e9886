"""How the rows are shown."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medpretrain.preflight.facts import HostFacts
from medpretrain.preflight.rows import Row, Status, listed

_WIDTH_OF_LOGS = 160
_COLOURS: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "not measured": "dim"}


def show(rows: Sequence[Row], hosts: Sequence[HostFacts], console: Console | None = None) -> None:
    """Print the table, and a last line that counts."""
    # A log is wide, and a table of 80 columns in it is hard to read.
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH_OF_LOGS)
    table = Table(box=None, pad_edge=False)
    for title in ("check", "", "host", "found", "what to do"):
        table.add_column(title, no_wrap=title in ("check", ""), overflow="fold")
    for row in rows:
        colour = _COLOURS[row.status]
        words = [
            row.check,
            f"[{colour}]{row.status}[/]",
            escape(listed(row.host.split(", ")) if row.host else "all"),
            escape(row.figures),
        ]
        table.add_row(*words, escape(row.advice))
    console.print(table)
    counts = Counter(row.status for row in rows)
    said = ", ".join(f"{counts[status]} {status}" for status in _COLOURS if counts[status])
    bad = dict.fromkeys(name for row in rows if row.status == "fail" and row.host for name in row.host.split(", "))
    named = f"; look at {listed(bad, most=64)}" if bad else ""
    console.print(f"preflight of {len(hosts)} host{'s' * (len(hosts) > 1)}: {said}{escape(named)}", soft_wrap=True)
