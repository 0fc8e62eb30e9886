"""All that follows a run, from one call: provenance, MLflow, TensorBoard, and the curves at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from data_prep.errors import UserError, WorkFailed
from medpretrain.health.exits import Exit
from medpretrain.recipe import Recipe
from medpretrain.tracking.curves import draw_curves
from medpretrain.tracking.keys import recipe_params
from medpretrain.tracking.provenance import write_provenance
from medpretrain.tracking.sender import Tracker
from medpretrain.tracking.tensorboard import TensorBoardWriter, refuse_without_tensorboard

_LEAVING_S = 5.0

_log = logging.getLogger(__name__)


def check_tracking(recipe: Recipe) -> None:
    """Refuse what a run could not be tracked with, before anything is written.

    Raises:
        UserError: a package is missing.
    """
    if recipe.tracking.tensorboard:
        refuse_without_tensorboard()


class RunTracking:
    """Follows the metrics of a run folder until it is closed; for rank 0 alone, once metrics.jsonl is as it goes on.

    As a context manager it ends as FINISHED, as FAILED after an error, and as KILLED after an interrupt, an exit, or a
    signal that asked the run to leave. But for the first, servers are waited for less long, and where it was asked to
    leave no curves are drawn: torchrun kills 30 s after its signal, and a restart should not wait. `sync` does what is
    left.

    Args:
        recipe: the recipe as it is trained; `recipe.yaml` is in the run folder.
        dataset_sha256: the hash of each dataset.
        world_size: processes that train.

    Raises:
        UserError: a package that the recipe asks for is missing, or a file of an earlier start is broken.
    """

    def __init__(self, recipe: Recipe, dataset_sha256: Sequence[str], world_size: int) -> None:
        check_tracking(recipe)
        self._run = run = recipe.run_dir
        written = write_provenance(run, recipe, dataset_sha256, world_size=world_size)
        self._tracker = Tracker(
            run,
            recipe.tracking.uri,
            recipe.tracking.experiment,
            recipe.name,
            recipe_params(recipe, dataset_sha256),
            [run / "recipe.yaml", *written],
        )
        self._tensorboard = TensorBoardWriter(run) if recipe.tracking.tensorboard else None
        self._closed = False

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0, curves: bool = True) -> None:
        """Draw the curves, send what is left, and end; a second call does nothing.

        Args:
            status: MLflow's word: FINISHED, FAILED or KILLED.
            timeout_s: longest time to wait for a server, in seconds.
            curves: draw them, which takes seconds.
        """
        if self._closed:
            return
        self._closed = True
        drawn: list[Path] = []
        try:
            drawn = draw_curves(self._run) if curves else []
        except (OSError, UserError) as error:  # a figure must not cost the last metrics, nor hide why a run failed
            _log.warning("no curves are drawn: %s", error)
        if self._tensorboard is not None:
            self._tensorboard.close(timeout_s)
        self._tracker.close(timeout_s, status, drawn)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        asked = isinstance(error, WorkFailed) and error.exit_code == Exit.PREEMPTED
        status = "FAILED" if issubclass(kind, Exception) and not asked else "KILLED"
        self.close(status, _LEAVING_S, curves=not asked)
