"""Handing a script to SLURM, and watching what becomes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError, WorkFailed, nearest

_POLL_S = 2.0
_GONE_S = 60.0
"""slurmctld may be away for a moment; a job that is not known any more after this is over."""
OVER = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED")
)
"""States from which no job comes back by itself; REQUEUED, SIGNALING, STAGE_OUT, ... pass."""


def refuse_without_slurm() -> None:
    """
    Raises:
        UserError: this host has no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is missing here: run this on a login node of the cluster, or write the script with --dry-run and "
            "submit it there"
        )


def refuse_partition(partition: str | None, nodes: int) -> None:
    """
    Raises:
        UserError: the cluster has no such partition, or fewer nodes in it.
    """
    if partition is None:
        return
    listed = [line.split() for line in _ask("sinfo", "--noheader", "--format=%R %D").splitlines()]
    sizes: dict[str, int] = {}
    for name, count in listed:
        sizes[name] = sizes.get(name, 0) + int(count)
    named = partition.split(",")  # SLURM takes the first of several that is free
    for name in named:
        if name not in sizes:
            raise UserError(f"there is no partition {name!r}{nearest(name, sizes)}; `sinfo` lists them")
    largest = max(named, key=lambda name: sizes[name])
    if sizes[largest] < nodes:
        raise UserError(f"partition {largest} has {sizes[largest]} nodes, not {nodes}")


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    number: str
    log: Path
    """Of an array that of its first task."""


def submit(script: Path, log: Path) -> Submitted:
    """Hand over a script; `log` is what it names as output, with %j, %A or %a.

    Raises:
        UserError: SLURM refuses it; in SLURM's words.
    """
    _ask("sbatch", "--test-only", str(script))
    number = _ask("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    return Submitted(number, Path(str(log).replace("%j", number).replace("%A", number).replace("%a", "1")))


def state(number: str) -> str | None:
    """RUNNING, PENDING, COMPLETED, ... of a job, the most alive of an array's; None if SLURM does not know it (now)."""
    asked = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", number], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        return None
    states = re.findall(r"\bJobState=([A-Z_]+)", asked.stdout)
    first = [one for one in ("RUNNING", "COMPLETING") if one in states]
    alive = [one for one in states if one not in OVER]
    bad = [one for one in states if one != "COMPLETED"]
    return next(iter([*first, *alive, *bad, *states]), None)


def follow(job: Submitted, say: Callable[[str], None]) -> str:
    """Hand what is written to the log to `say`, until the job is over; gives its last state.

    Raises:
        WorkFailed: SLURM does not answer any more.
    """
    at, last, known, since = 0, "", time.monotonic(), ""
    while True:
        now = state(job.number)
        at = _tell(job.log, at, say)
        if now is None:
            if time.monotonic() - known > _GONE_S:
                raise WorkFailed(
                    f"SLURM does not know job {job.number} any more; its last state was {last or 'unknown'}"
                )
        else:
            known, last = time.monotonic(), now
            if now in OVER:
                _tell(job.log, at, say)
                return now
            if now != since and now == "PENDING":
                say(f"job {job.number} waits in the queue\n")
            since = now
        time.sleep(_POLL_S)


def _tell(log: Path, at: int, say: Callable[[str], None]) -> int:
    try:
        with log.open("rb") as file:
            file.seek(at)
            new = file.read()
    except FileNotFoundError:
        return at
    if new:
        say(new.decode(errors="replace"))
    return at + len(new)


def _ask(*words: str) -> str:
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is missing here; it belongs to SLURM's client programs") from None
    if answer.returncode != 0:
        said = "; ".join(line.strip() for line in answer.stderr.strip().splitlines() if line.strip())
        raise UserError(f"{words[0]}: {said or f'ended with {answer.returncode}'}")
    return answer.stdout
