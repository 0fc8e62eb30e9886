"""`medpretrain sync`: a run folder sent to a tracking server, at any time after, or again.

The server is asked what it has, and gets the rest: so it does not matter whether the run was sent there before, in
part, or to another server, nor whether an earlier sync was killed. Needs no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_prep.errors import UserError, WorkFailed
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import read_recipe
from medpretrain.tracking.curves import draw_curves
from medpretrain.tracking.keys import recipe_params
from medpretrain.tracking.metrics_log import read_metrics
from medpretrain.tracking.provenance import ENVIRONMENT_GLOB, PROVENANCE_FILE, dataset_hashes, first_start
from medpretrain.tracking.redaction import redact
from medpretrain.tracking.session import Session, brief, default_uri, failures, first_batch
from medpretrain.tracking.state import RunState, only_sender, server_file

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class Synced:
    """What a sync did: rows of the run, points sent now, points that the server had before."""

    uri: str
    rows: int
    points: int
    there: int


def sync(
    run: Path,
    uri: str | None = None,
    experiment: str | None = None,
    timeout_s: float = 60.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Synced:
    """Send all that an MLflow server lacks of a run: points, parameters, files, and how it ended.

    Args:
        run: the run folder.
        uri: MLflow's tracking URI; None: the recipe's, or $MLFLOW_TRACKING_URI, or the SQLite file beside the folder.
        experiment: MLflow's experiment; None: the recipe's.
        timeout_s: how long the server may give no useful answer, in seconds.
        progress: called with the rows done and all rows.

    Raises:
        UserError: the folder holds no run, or no server is known.
        WorkFailed: the server cannot be reached in the time, or did not take a file.
    """
    recipe = _recipe(run)
    rows = len(read_metrics(run / "metrics.jsonl"))
    uri = _uri(run, recipe, uri)
    # MLflow reads it at each call; unless the user has set it, one call must not outlast the whole time.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, min(10, int(timeout_s)))))
    try:
        expected = failures()
    except ImportError as error:
        raise UserError(f"sync needs MLflow, which the train extra brings ({error})") from None
    draw_curves(run)
    with ExitStack() as stack:
        try:
            stack.enter_context(only_sender(server_file(run, uri)))
        except BlockingIOError:
            raise UserError(f"{run} is being sent to {redact(uri)} by another process right now") from None
        insist = _Insist(uri, expected, timeout_s)
        session = insist(lambda: Session(run, uri))
        params, started = recipe_params(recipe, dataset_hashes(run)), first_start(run)
        start_ms = None if started is None else int(started * 1000)
        experiment = experiment or recipe.tracking.experiment
        follower = insist(lambda: session.start(experiment, recipe.name, params, start_ms))
        there = insist(session.points_there)
        follower.position = (-1, 0)
        done, sent, points = 0, 0, 0
        while waiting := follower.rows():
            batch = first_batch(waiting, follower)
            points += sum(len(follower.points(placed)) for placed in batch)
            sent += insist(lambda batch=batch: session.send(batch, follower, there))  # type: ignore[misc]
            done += len(batch)
            progress(done, max(rows, done))
        insist(lambda: session.attach(artifacts(run), expected))
        state = RunState.of(run)
        status = state.shown(run)
        if status != "RUNNING":
            ended = state.ended or (run / "metrics.jsonl").stat().st_mtime
            insist(lambda: session.end(status, int(ended * 1000)))
    if session.unattached:
        names = ", ".join(path.name for path in session.unattached)
        raise WorkFailed(f"all {done} rows are at {redact(uri)}, but it did not take the files {names}")
    return Synced(redact(uri), done, sent, points - sent)


def artifacts(run: Path) -> list[Path]:
    """The files of a run that a server gets, as far as they are there."""
    names = ("recipe.yaml", PROVENANCE_FILE, "curves.png", "curves.svg")
    return [path for path in (run / name for name in names) if path.exists()] + sorted(run.glob(ENVIRONMENT_GLOB))


class _Insist:
    """Makes a call until it works, or until no call has worked for some time."""

    def __init__(self, uri: str, expected: tuple[type[Exception], ...], timeout_s: float) -> None:
        self._uri, self._expected, self._timeout_s = uri, expected, timeout_s

    def __call__(self, call: Callable[[], _T]) -> _T:
        deadline, wait_s = time.monotonic() + self._timeout_s, _FIRST_WAIT_S
        while True:
            try:
                return call()
            except self._expected as error:
                if isinstance(error, UserError):
                    raise
                if time.monotonic() + wait_s > deadline:
                    raise WorkFailed(
                        f"MLflow at {redact(self._uri)} gave no useful answer in {self._timeout_s:g} s "
                        f"({brief(error, self._uri)}); the same command goes on from there"
                    ) from None
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _recipe(run: Path) -> Recipe:
    path = run / "recipe.yaml"
    if not path.is_file() or not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is not a run folder: it holds no recipe.yaml and metrics.jsonl")
    try:
        return read_recipe(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a recipe of a run: {str(error).splitlines()[0]}") from None


def _uri(run: Path, recipe: Recipe, given: str | None) -> str:
    ours = recipe.tracking.uri
    if given is None and ours is not None and "***" in ours:
        raise UserError(f"{run} was tracked at {ours} and passwords are not kept: give --uri")
    uri = default_uri(run, given or (None if ours == "none" else ours))
    if uri == "none":
        raise UserError("--uri none is no server")
    return uri
