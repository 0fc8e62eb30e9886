"""How far a preparation is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_prep import options

LOG_EVERY = 60.0  # seconds

Report = Callable[[options.Progress], None]


class _Rate(TextColumn):
    """Images a second over the last half minute."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "-/s")


@contextmanager
def progress() -> Iterator[Report]:
    """A function to be told of `Progress`; what it shows has counts only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[more]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None, more="")
        shown = ""

        def report(now: options.Progress) -> None:
            nonlocal shown
            if now.what != shown:
                shown = now.what
                bars.reset(bar, description=shown, total=now.total)
            bars.update(bar, completed=now.done, total=now.total, more=_more(now))

        yield report


class _Lines:
    """A line on stderr now and then, for a log file."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._started = self._last = time.monotonic()
        self._first: tuple[str, int] | None = None

    def __call__(self, now: options.Progress) -> None:
        moment = time.monotonic()
        if self._first is None or self._first[0] != now.what:
            self._first, self._started = (now.what, now.done), moment
        if moment - self._last < LOG_EVERY:
            return
        self._last = moment
        rate = (now.done - self._first[1]) / max(moment - self._started, 1e-9)
        left = "" if not rate or now.total is None else f", {(now.total - now.done) / rate / 60:.0f} min left"
        total = "" if now.total is None else f" of {now.total:,}"
        self._console.print(f"{now.what}: {now.done:,}{total}, {rate:,.0f}/s{left}{_more(now)}")


def _more(now: options.Progress) -> str:
    size = f", {now.bytes / 1e9:,.2f} GB" if now.bytes else ""
    return size + (f", {now.quarantined:,} quarantined" if now.quarantined else "")
