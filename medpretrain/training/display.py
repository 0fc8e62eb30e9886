"""How a run looks while it trains: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Display:
    """Shows the rows of a run: step, loss, images/s, share of time waiting for data, feature std, RankMe, time left.

    On a terminal one block is redrawn in place, at most four times a second; elsewhere each row is one plain line. A
    row needs `step`; `loss`, `images_per_s`, `data_wait` (share of the time, 0 to 1), `feature_std` and `rankme` are
    shown if they are there.

    Args:
        total_steps: length of the run in steps.
        start_step: steps done before this start, for the time left of a resumed run.
        console: where to draw; None: standard error, so that standard output stays clean.
        clock: seconds, for the time left.

    >>> from rich.console import Console
    >>> with Display(100, console=Console(width=200), clock=lambda: 0.0) as display:
    ...     display.update({"step": 10, "loss": 5.25, "images_per_s": 812.4, "data_wait": 0.031})
    step 10/100  loss 5.25  812 images/s  data wait 3.1 %
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._first_step, self._first_time = start_step, clock()
        drawn_in_place = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, refresh_per_second=4) if drawn_in_place else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, row: Mapping[str, Any], alarm: str = "") -> None:
        """Show a row, and an alarm that it raises."""
        facts = self._facts(row)
        if self._live is None:
            line = f"step {row['step']}/{self._total}  " + "  ".join(facts) + (f"  {alarm}" if alarm else "")
            self._console.print(line.rstrip(), soft_wrap=True, markup=False, highlight=False, emoji=False)
            return
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_row(f"step {row['step']}/{self._total}", ProgressBar(total=self._total, completed=row["step"]))
        parts: list[Table | Text] = [bar, Text("  ".join(facts))]
        if alarm:
            parts.append(Text(alarm, style="bold white on red"))
        self._live.update(Group(*parts))

    def _facts(self, row: Mapping[str, Any]) -> list[str]:
        facts = []
        for name, shown in (
            ("loss", "loss {:.4g}"),
            ("images_per_s", "{:.0f} images/s"),
            ("data_wait", "data wait {:.1%}"),
            ("feature_std", "feature std {:.3g}"),
            ("rankme", "RankMe {:.3g}"),
        ):
            if row.get(name) is not None:
                facts.append(shown.format(row[name]).replace("%", " %"))
        done = row["step"] - self._first_step
        elapsed = self._clock() - self._first_time
        if done > 0 and elapsed > 0:
            facts.append(f"{_duration(elapsed / done * max(self._total - row['step'], 0))} left")
        return facts


def _duration(seconds: float) -> str:
    """The two largest units.

    >>> _duration(59.6), _duration(3725), _duration(200_000)
    ('1m 00s', '1h 02m', '2d 07h')
    """
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s"
