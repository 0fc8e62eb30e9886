"""`medpretrain sweep`: many runs from one file. Imports no torch; each run is a process of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep.errors import UserError, WorkFailed

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, of every run's recipe, as in data.path=shards/x", show_default=False),
]


def sweep(
    name: Annotated[str, typer.Argument(metavar="SWEEP", help="a shipped sweep's name, or a .yaml file")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="the folder of all its runs; sweeps/NAME by default", show_default=False)
    ] = None,
    only: Annotated[
        int | None, typer.Option(help="the run of this number alone, for an array of jobs", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time; they share this host's device")] = 1,
    launch: Annotated[
        str, typer.Option(help='train by `medpretrain launch ...`, as in "torchrun --gpus 8 --no-preflight"')
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the commands of each run, and start nothing")
    ] = False,
) -> None:
    """Train and evaluate all runs of a sweep; the same command goes on where it stopped, and draws the figure again."""
    from medpretrain.sweep.expand import expand
    from medpretrain.sweep.figure import draw
    from medpretrain.sweep.folder import Folder, planned
    from medpretrain.sweep.results import results_of, table, write_results
    from medpretrain.sweep.run import SweepStopped, Work, execute, refuse_launch
    from medpretrain.sweep.sweep_file import load_sweep

    loaded = load_sweep(name)
    launched = shlex.split(launch)
    refuse_launch(launched)
    runs = expand(loaded, overrides or [])
    folder = Folder(out or Path("sweeps") / loaded.name)
    if only is not None and not 0 <= only < len(runs):
        raise UserError(f"--only {only}: the sweep {loaded.name} has runs 0 to {len(runs) - 1}")
    works = [Work.of(loaded, run, planned(run), folder, launched) for run in runs if only in (None, run.number)]
    if dry_run:
        for work in works:
            said = ", ".join(f"{axis} {value}" for axis, value in work.planned.axes.items())
            print(f"# {work.planned.number}: {work.planned.name} ({said})")
            for step in work.steps:
                print(step)
        return
    console = Console()
    folder.write_plan(loaded, runs)
    outcome = execute(works, folder, jobs, lambda line: console.print(line, highlight=False, soft_wrap=True))
    results = results_of(folder)
    write_results(folder, results)
    drawn = draw(folder, results)
    console.print(table(results))
    console.print(", ".join(str(path) for path in (folder.path / "sweep.csv", *drawn)), highlight=False, soft_wrap=True)
    failed = "; ".join(f"{run}: {why} (see {folder.log(run)})" for run, why in outcome.failed.items())
    if outcome.stopped:
        also = f"; failed before: {failed}" if failed else ""
        raise SweepStopped(f"asked to leave; the same command goes on{also}")
    if failed:
        raise WorkFailed(
            f"{len(outcome.failed)} of {len(works)} runs failed; the same command tries them again: {failed}"
        )
