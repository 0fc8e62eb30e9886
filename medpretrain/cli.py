"""The `medpretrain` command. Every subcommand is a thin call into one place, and torch is imported inside those that
need it: a login node without torch lists recipes, a hospital without it prepares data."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress
from rich.table import Table

import data_prep.cli
import medpretrain.cli_evaluate
import medpretrain.cli_launch
import medpretrain.cli_sweep
from data_prep.errors import UserError, WorkFailed
from medpretrain.health import last_words
from medpretrain.health.exits import exit_codes
from medpretrain.recipe_file import dump_recipe, load_recipe, recipe_files

app = typer.Typer(
    help="Large-scale pretraining for medical images: shards in, an evaluated, exported backbone out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_prep.cli.app, name="prep")
recipes_app = typer.Typer(help="List the shipped recipes, or show one resolved.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(medpretrain.cli_launch.app, name="launch")
app.add_typer(medpretrain.cli_evaluate.app, name="evaluate")
app.command()(medpretrain.cli_sweep.sweep)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as in optim.lr=3e-4", show_default=False)]
RecipeName = Annotated[str, typer.Argument(help="a shipped recipe's name, or a .yaml file")]
RunFolder = Annotated[Path, typer.Argument(help="a run folder")]


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    table = Table(box=None)
    table.add_column("recipe", no_wrap=True)
    table.add_column("about")
    for name in recipe_files():
        table.add_row(name, load_recipe(name).about)
    Console().print(table)


@recipes_app.command("show")
def show(name: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with every default spelled out."""
    print(dump_recipe(load_recipe(name, overrides or [])), end="")


@app.command(epilog=exit_codes())
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: from the newest whole checkpoint of run.dir; never; or the folder or URL of a checkpoint"
        ),
    ] = "auto",
    override: Annotated[
        list[str] | None,
        typer.Option(help="a key in which the recipe may differ from the checkpoint's, as in optim.lr; repeatable"),
    ] = None,
) -> None:
    """Pretrain a backbone; alone, or under torchrun."""
    loaded = load_recipe(recipe, overrides or [])
    from medpretrain.training.loop import train as run_training

    last_words.remember(loaded.run_dir)
    try:
        finished = run_training(loaded, resume, override or [])
    except KeyboardInterrupt as error:  # typer would say no more than "Aborted."
        raise WorkFailed("interrupted from the keyboard") from error
    if _leads():
        print(f"{finished.step} steps done. Checkpoint: {finished.checkpoint}")
        print(f"next: medpretrain evaluate knn {finished.run} {loaded.data.path[0]} --baseline random")
        print(f"      medpretrain export {finished.run} OUT")


@app.command(
    epilog="Exit codes: 0: no row fails; 1: one does, or the others were not found; 2: a wrong option or recipe."
)
def preflight(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="hosts of the run; the command is started on each", min=1)] = None,
    gpus: Annotated[int | None, typer.Option(help="processes on this host; one a GPU by default", min=1)] = None,
    head: Annotated[str | None, typer.Option(help="HOST:PORT of the host where all meet", show_default=False)] = None,
    hosts: Annotated[str | None, typer.Option(help="their names, a,b,c: who is missing is named")] = None,
    name: Annotated[
        str | None, typer.Option(help="this host's name; SLURMD_NODENAME or its host name by default")
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds that the others are waited for")] = 180.0,
    verify_shards: Annotated[str, typer.Option(help="shards of each dataset to verify on each host, or all")] = "2",
    local: Annotated[bool, typer.Option("--local", help="this host alone, without a rehearsal")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write everything to this file")] = None,
    resume: Annotated[str, typer.Option(help="as of `medpretrain train`")] = "auto",
    override: Annotated[
        list[str] | None, typer.Option(help="as of `medpretrain train`; repeatable", show_default=False)
    ] = None,
) -> None:
    """Check hosts, network, data, disk and memory before a run, and rehearse some steps; trains nothing."""
    if not (verify_shards == "all" or verify_shards.isdigit()):
        raise UserError(f"--verify-shards {verify_shards!r}: give a number, or all")
    loaded = load_recipe(recipe, overrides or [])
    from medpretrain.preflight.run import preflight as run_preflight

    passed = run_preflight(
        loaded,
        nodes=nodes,
        gpus=gpus,
        head=head,
        hosts=[name.strip() for name in hosts.split(",")] if hosts else (),
        name=name,
        timeout_s=timeout,
        verify_shards=None if verify_shards == "all" else int(verify_shards),
        local=local,
        json_file=json_file,
        resume=resume,
        override=tuple(override or ()),
    )
    raise typer.Exit(0 if passed else 1)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    forms: Annotated[str, typer.Option(help="what to write beside the form for timm")] = "timm,onnx,pt2",
    register: Annotated[
        str | None, typer.Option(help="also a version of this model in MLflow's registry", show_default=False)
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="of the registered version; repeatable", show_default=False)
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow's tracking URI; the run's own by default", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
) -> None:
    """Export a run's backbone for timm, ONNX and torch.export; each is loaded back and compared before OUT appears."""
    from medpretrain.export.of_run import export_run

    export_run(
        run, out, forms=forms, register=register, aliases=alias or (), tracking_uri=tracking_uri, overwrite=overwrite
    )


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN... OUT", help="run folders or folders of evaluations; then the new folder"),
    ],
    no_images: Annotated[bool, typer.Option("--no-images", help="show no pictures of patients")] = False,
    title: Annotated[str | None, typer.Option(help="of the page", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier report")] = False,
) -> None:
    """One page that shows what runs have come to, with figures and tables as files."""
    from medpretrain.report.write import report_command

    report_command(folders, not no_images, title, overwrite)


@app.command()
def sync(
    run: RunFolder,
    uri: Annotated[
        str | None, typer.Option(help="an MLflow tracking URI; the run's own by default", show_default=False)
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="MLflow's experiment; the run's own by default", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds that the server may give no answer")] = 60.0,
) -> None:
    """Send what a tracking server lacks of a run: metrics, parameters, files, and how it ended."""
    from medpretrain.tracking.replay import sync as run_sync

    with Progress(console=Console(stderr=True), transient=True) as bar:
        rows = bar.add_task("rows")
        synced = run_sync(
            run, uri, experiment, timeout, lambda done, total: bar.update(rows, completed=done, total=total)
        )
    print(f"{synced.rows} rows, {synced.points} points sent; {synced.there} were there already: {synced.uri}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where everything goes")] = Path("demo"),
    per_class: Annotated[int, typer.Option(help="images made of each class")] = 48,
    steps: Annotated[int | None, typer.Option(help="steps of each run instead of the recipes'")] = None,
) -> None:
    """The whole road on images made up on the spot: needs no data, no network and no GPU."""
    from medpretrain.demo import run_demo

    run_demo(out, per_class=per_class, steps=steps)


def main() -> None:
    """The console script: whatever goes wrong, its last line says what, and the exit code is one of `Exit`."""
    logging.basicConfig(
        level=logging.INFO if _leads() else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    for chatty in ("mlflow", "alembic", "httpx", "timm", "nvidia", "matplotlib", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    last_words.remember(None)
    try:
        app()
    except Exception as error:
        last_words.end(error)


def _leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
