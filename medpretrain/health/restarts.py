"""Restarts that bring a run no step further come to an end."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from data_prep.errors import WorkFailed
from medpretrain.health.exits import Exit
from medpretrain.health.last_words import append_row, failures, read_rows

STARTS_FILE = "starts.jsonl"


class NoProgress(WorkFailed):
    """The run was restarted several times from the same step; the message has the causes as far as they are known."""

    exit_code = Exit.NO_PROGRESS


def restart_count() -> int:
    """How often torchrun, SLURM, its batch script or a JobSet has started this run again; 0: it was started by hand."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "MEDPRETRAIN_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT")
    return sum(int(os.environ.get(name) or 0) for name in names)


def going_on(run: Path, resume: str) -> str:
    """`resume` of this start: what was asked for is for the first start of a launch, whose words every restart has too;
    a restart goes on from what that one came to."""
    rows = read_rows(run / STARTS_FILE)
    return "auto" if restart_count() and rows and rows[-1].get("resume") == resume else resume


def refuse_no_progress(run: Path, step: int, limit: int, resume: str = "auto") -> None:
    """Note this start in RUN/starts.jsonl, or refuse it; rank 0 alone calls it, before training.

    Args:
        run: the run's folder, made already.
        step: the step from which the run would go on.
        resume: what was asked for.
        limit: restarts one after another from the same step that are let pass.

    Raises:
        NoProgress: this is a restart, and so were the last `limit` starts, all from `step`. A start by hand passes, and
            counts anew.
    """
    rows, restart = read_rows(run / STARTS_FILE), restart_count()
    recent = rows[-limit:]
    if restart and len(recent) == limit and all(_restarted_from(row, step) for row in recent):
        raise NoProgress(
            f"{limit} restarts one after another went on from step {step} and none got to the next checkpoint"
            f"{_causes(run, recent)}. A start by hand goes on from step {step}"
        )
    host, world = socket.gethostname(), int(os.environ.get("WORLD_SIZE", "1"))
    row = {"time": time.time(), "step": step, "world": world, "host": host, "restart": restart, "resume": resume}
    append_row(run / STARTS_FILE, row)


def _restarted_from(row: dict[str, Any], step: int) -> bool:
    return row.get("step") == step and bool(row.get("restart"))


def _causes(run: Path, starts: list[dict[str, Any]]) -> str:
    """What ended the runs that these starts began."""
    since = starts[0].get("time", 0)
    known: dict[str, int] = {}
    for row in failures(run):
        if row.get("time", 0) >= since and not row.get("consequence") and row.get("code") != Exit.NO_PROGRESS:
            said = f"rank {row.get('rank')} on {row.get('host')}: {row.get('cause')}"
            known[said] = known.get(said, 0) + 1
    if not known:
        return "; what ended them is not known, so they were killed or lost their host"
    return "; they ended with " + ", ".join(f"{said} ({count} x)" for said, count in known.items())
