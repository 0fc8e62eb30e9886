"""Where a run begins: anew, or from a checkpoint that belongs to it."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from data_prep.errors import UserError, nearest
from medpretrain.checkpoints import CheckpointInfo, Found, Target, aside_later, at, newest, open_target
from medpretrain.checkpoints.retention import retire
from medpretrain.checkpoints.target import step_of
from medpretrain.recipe import OVERRIDABLE, Recipe
from medpretrain.recipe_file import read_recipe
from medpretrain.training.process import Process

RECIPE_FILE = "recipe.yaml"
_LOCK = ".lock"

_log = logging.getLogger(__name__)


def check_folder(run: Path) -> None:
    """Raises:
    UserError: a file, or a folder of something else.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"run.dir={run} is a file")
    if run.is_dir() and any(run.iterdir()) and not (run / RECIPE_FILE).is_file():
        raise UserError(f"run.dir={run} holds something that is not a run; give another folder")


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Two runs never write into one folder.

    Raises:
        UserError: another process holds it.
    """
    with (run / _LOCK).open("w") as lock:
        _hold(lock, run)
        yield


def refuse_second_writer(run: Path) -> None:
    """The same, for one that is not to write yet.

    Raises:
        UserError: another process holds it.
    """
    if (run / _LOCK).is_file():
        with (run / _LOCK).open() as lock:
            _hold(lock, run)


def _hold(lock: TextIO, run: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {run}") from None


def start_from(
    run: Path,
    target: Target,
    resume: str,
    about: CheckpointInfo,
    recipe: Recipe,
    override: Collection[str],
    own: Process,
) -> Found | None:
    """The checkpoint to go on from, verified and found to be of this recipe and these data; a collective.

    Damaged ones are put aside, and so are those of later steps where an earlier one was asked for.

    Args:
        resume: `auto`, `never`, or the path or URL of a checkpoint or of a run.
        override: keys in which the recipe may differ from the checkpoint's.

    Raises:
        UserError: no such checkpoint, none that is whole, or one of another recipe or dataset.
    """
    refuse_overrides(override)
    found = chosen(run, target, resume, own, aside=True)
    if found is not None:
        refuse_other(recipe, found, about, override)
        if resume != "auto":  # a crash must not bring the run back to later ones
            for place in aside_later(target, found.step, own):
                if own.leads:
                    _log.warning("a checkpoint that is later than %s is put aside: %s", found, place)
        if own.leads:  # a launch that was killed between a commit and this leaves more than are kept
            keep = recipe.checkpoint
            retire(target, found.step, keep=keep.keep, keep_every=keep.keep_every, keep_best=keep.keep_best is not None)
    return found


def refuse_overrides(override: Collection[str]) -> None:
    """Raises:
    UserError: a key that may not differ between a run and its resumption.
    """
    for key in override:
        if not key.startswith(OVERRIDABLE) or key == "optim.name":
            raise UserError(f"--override {key}: what may differ is {', '.join(OVERRIDABLE)}{nearest(key, OVERRIDABLE)}")


def chosen(run: Path, target: Target, resume: str, own: Process | None, *, aside: bool) -> Found | None:
    """The checkpoint that a run goes on from, verified; a collective.

    Args:
        own: None for a process alone.
        aside: move damaged ones above it out of the way.

    Raises:
        UserError: no such checkpoint, or none that is whole.
    """
    if resume not in ("auto", "never"):
        return _asked_for(resume, own)
    kept = target.names() if own is None else own.agreed(target.names)
    if kept and resume == "never":
        raise UserError(f"{run} has checkpoints already and --resume never would train over them; set another run.dir")
    found = newest(target, own, aside=aside) if kept else None
    if kept and found is None:
        raise UserError(f"none of the checkpoints in {target} is whole; to start anew give another run.dir")
    return found


def _asked_for(place: str, own: Process | None) -> Found:
    if not (Path(place) / RECIPE_FILE).is_file():
        if Path(place).is_dir() and step_of(Path(place).name) is None:
            raise UserError(f"{place} is neither a run nor a checkpoint")
        return at(place, own)
    found = newest(open_target(read_recipe((Path(place) / RECIPE_FILE).read_text()).checkpoint.to, Path(place)), own)
    if found is None:
        raise UserError(f"the run in {place} has no whole checkpoint")
    return found


def refuse_other(recipe: Recipe, found: Found, about: CheckpointInfo, override: Collection[str]) -> None:
    """Raises:
    UserError: the checkpoint is of another dataset, or of a recipe that differs in what `override` does not name.
    """
    theirs = found.info.dataset_sha256
    if theirs != about.dataset_sha256:  # first, for mean and std in the recipe follow from the data
        paths = dict(zip(about.dataset_sha256, recipe.data.path, strict=True))
        if paths.keys() == set(theirs):
            order = ",".join(paths[sha256] for sha256 in theirs)
            raise UserError(f"{found} has its datasets in another order; go on with data.path=[{order}]")
        seen = ", ".join(sha256[:12] for sha256 in theirs)
        ours = ", ".join(f"{name} ({sha256[:12]})" for sha256, name in paths.items())
        raise UserError(
            f"{found} is of another dataset: it has seen {seen}, and data.path is {ours}; set another run.dir"
        )
    if found.info.recipe_sha256 == about.recipe_sha256:
        return
    now, was = recipe.identity(), read_recipe(found.info.recipe).identity()
    keys = [key for key in {**was, **now} if now.get(key) != was.get(key) and not _under(key, override)]
    if not keys:
        return
    shown = [f"{key} was {was.get(key)!r} and is {now.get(key)!r}" for key in keys[:4]]
    difference = ", ".join(shown) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    raise UserError(f"{found} is of another recipe: {difference}; {_way_out(keys)}")


def _way_out(keys: list[str]) -> str:
    if all(key.startswith(OVERRIDABLE) and key != "optim.name" for key in keys):
        return f"to go on all the same add {' '.join(f'--override {key}' for key in keys)}, or set another run.dir"
    return "set another run.dir"


def _under(key: str, override: Collection[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in override)
