"""What `medpretrain launch` is asked for, from words and files; what is wrong is said before anything is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

import data_prep.cli
from data_prep.cli_prepare import COMMANDS
from data_prep.errors import UserError, nearest
from data_prep.store import is_url
from launchers.job import Job, PrepJob
from launchers.passwords import refuse_password
from launchers.site import Site
from medpretrain.recipe_file import load_recipe
from medpretrain.strict_yaml import Document

SITE_VARIABLE = "MEDPRETRAIN_SITE"
SITE_FILE = Path("~/.config/medpretrain/site.yaml")


def load_site(path: Path | None) -> Site:
    """The site's defaults: of the file that is given, or named by the environment, or lies in the user's place.

    Raises:
        UserError: no such file, or one that is wrong; with the line.
    """
    named = path or (Path(os.environ[SITE_VARIABLE]) if os.environ.get(SITE_VARIABLE) else None)
    if named is None:
        usual = SITE_FILE.expanduser()
        if not usual.is_file():
            return Site()
        named = usual
    if not named.is_file():
        raise UserError(f"there is no site file {named}")
    typer.echo(f"site defaults: {named}", err=True)
    return Document(named, "a site file").checked(Site)


def job_of(recipe: str, overrides: list[str] | None, resume: str, override: list[str] | None) -> Job:
    """
    Raises:
        UserError: the recipe cannot be read, or names no dataset; a password stands in it or in a word.
    """
    for word in (recipe, *(overrides or ()), resume, *(override or ())):
        refuse_password(word)
    loaded = load_recipe(recipe, overrides or [])
    to = loaded.checkpoint.to
    places = {"tracking.uri": loaded.tracking.uri, "checkpoint.to": to, "run.dir": loaded.run.dir}
    for key, place in (*places.items(), *(("data.path", path) for path in loaded.data.path)):
        refuse_password(place or "", key)
    for place in (to, resume):
        is_url(place or "")
    if not loaded.data.path:
        raise UserError("the recipe names no dataset; give one, as in data.path=shards/fundus")
    options = [] if resume == "auto" else ["--resume", resume]
    for key in override or []:
        options += ["--override", key]
    return Job(
        loaded.name,
        recipe,
        tuple(overrides or ()),
        loaded.run_dir,
        loaded.train.global_batch,
        loaded.train.micro_batches,
        tuple(options),
        to,
    )


def prep_job_of(words: list[str], parts: int) -> PrepJob:
    """
    Raises:
        UserError: `medpretrain prep` would not take these words; a password stands in one.
    """
    for word in words:
        refuse_password(word)
    kind, *arguments = words
    if kind not in COMMANDS:
        raise UserError(f"there is no `medpretrain prep {kind}`{nearest(kind, COMMANDS)}")
    group = typer.main.get_command(data_prep.cli.app)
    assert isinstance(group, TyperGroup)
    command = group.commands[kind]
    # A wrong option ends the command here.
    given = command.make_context(f"medpretrain prep {kind}", arguments)
    if given.params["part"] is not None:
        raise UserError("--part is given by the array; leave it out")
    asked = command.invoke(given)
    asked.check()
    source = given.get_parameter_source("workers")
    private = asked.running.private
    return PrepJob(
        tuple(words),
        parts,
        asked.out,
        source is not None and source.name == "COMMANDLINE",
        None if private is None else str(private),
        tuple(_read_by(given.params)),
    )


def _read_by(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """SOURCE and the files that options of a preparation name, each with what names it."""
    for name, value in options.items():
        path = str(value).removeprefix("fixed:")  # as --window names its table
        if name not in ("out", "private") and (isinstance(value, Path) or path.endswith((".yaml", ".yml"))):
            yield "SOURCE" if name == "source" else f"--{name.replace('_', '-')}", path


def launch_folder(run_dir: Path) -> Path:
    """Scripts and logs of a run's launches, beside its folder: a run's own folder holds nothing before it starts.

    Raises:
        UserError: the folder has no name of its own.
    """
    if run_dir.name in ("", ".."):
        raise UserError(f"run.dir={run_dir}: give a folder by its name, as in run.dir=runs/dino; logs go beside it")
    return run_dir.with_name(f"{run_dir.name}.launch")
