"""The last line of a run that ends badly: cause, rank, host, and the command that resumes it.

It goes to standard error, to RUN/failures.jsonl, and under torchrun to the file that torchrun's summary is made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from data_prep.errors import UserError, WorkFailed
from launchers.torchrun import END_AGENT
from medpretrain.health.exits import Exit
from medpretrain.tracking.redaction import redact

FAILURES_FILE = "failures.jsonl"
_RECIPE_FILE = "recipe.yaml"  # a folder that has it is a run
_LONGEST_CAUSE = 2000
_WAIT_FOR_CAUSE_S = 2.0
_LINGER_S = 1.0
_started = time.time()
_run: Path | None = None
_taken: socket.socket | None = None

# What gloo, NCCL and c10d's store say on the ranks that are left when one is gone.
_LOST_PEER = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|connection refused|socket closed"
    r"|remote process exit|connection was likely closed|nccl communicator was aborted"
    r"|application timeout caused pair closure|timed out waiting \d+ms for",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cause:
    """Why a run ends, and who says so."""

    text: str
    code: int
    said_by: Literal["host", "rank"] = "rank"
    """host: every process meets the same, and one line a host is enough."""
    trace: str = ""
    """The traceback, where one helps."""
    consequence: bool = False
    """Another rank's end is the cause."""


def remember(run: Path | None) -> None:
    """This process trains `run`: what ends it badly is kept in `run`/failures.jsonl, once that is a run's folder, and
    the last line says how to resume. None: it does something else."""
    global _run
    _run = run


def of(error: BaseException) -> Cause:
    """What an error means for the run."""
    if isinstance(error, UserError | WorkFailed):
        return Cause(str(error), error.exit_code, said_by="host")
    trace = redact("".join(traceback.format_exception(error)))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        first = str(error).split(". ")[0]
        return Cause(
            f"out of GPU memory ({first}). More train.micro_batches, train.checkpoint_activations=true, or "
            "strategy=fsdp2 need less; none of them changes what is trained",
            Exit.FAILED,
            trace=trace,
        )
    if _lost_peer(error):
        return Cause(f"another rank was lost{_its_words()}", Exit.FAILED, consequence=True)
    return Cause(f"{type(error).__name__}: {error}", Exit.FAILED, trace=trace)


def end(error: BaseException) -> NoReturn:
    """Say the last words of `error` and end the process with its exit code; what is not foreseen and ends no run is
    raised again."""
    if _run is None and not isinstance(error, UserError | WorkFailed):
        raise error
    cause = of(error)
    say(cause)
    _spare_restarts(cause.code)
    if _world() > 1:
        # Others of this host say the same for a moment; and torchrun must see the end of the rank that is the cause
        # before that of a rank that lost it, for it ends the others and names the first.
        if _taken is not None or cause.consequence:
            time.sleep(_LINGER_S)
        # A group that has lost a rank can hold up the interpreter's way out, and its warnings would come last.
        sys.stdout.flush()
        os._exit(cause.code)
    sys.exit(cause.code)


def _spare_restarts(code: int) -> None:
    """End the torchrun that `medpretrain launch` started where a restart would come to the same: it knows no exit code
    after which it does not start its processes again. The gate before it has the variable too, and another parent."""
    under_torchrun = {END_AGENT, "TORCHELASTIC_RUN_ID"} <= os.environ.keys() and os.getppid() != 1
    if code in (Exit.USER_ERROR, Exit.NO_PROGRESS) and under_torchrun:
        os.kill(os.getppid(), signal.SIGTERM)


def say(cause: Cause) -> None:
    """Write `cause` to standard error as the last line, and to the files that keep it."""
    text = redact(" ".join(cause.text.split()))[:_LONGEST_CAUSE]
    line = _line(text, cause)
    if cause.said_by == "rank" or (_first_on_host(line) and not _said_on_host(text)):
        if cause.code != Exit.USER_ERROR:
            _keep(text, cause)
        sys.stderr.flush()
        print(f"{cause.trace.rstrip()}\n{line}" if cause.trace else line, file=sys.stderr, flush=True)
    _tell_torchrun(line, cause)


def _line(text: str, cause: Cause) -> str:
    world = _world()
    if _run is None or cause.code == Exit.USER_ERROR:
        return f"error on {socket.gethostname()}: {text}" if world > 1 else f"error: {text}"
    return f"error on {socket.gethostname()}, rank {_rank()} of {world}: {text}; resume: {resume_command()}"


def _first_on_host(line: str) -> bool:
    """Whether no other process of this run on this host is saying the same.

    The first takes a name among the abstract sockets of Linux, which nobody else can have until it has ended, and stays
    a moment. Elsewhere everyone says it.
    """
    global _taken
    if _world() == 1 or sys.platform != "linux":
        return True
    same = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    same.append(re.sub(r", rank \d+ of", "", line))
    taken = socket.socket(socket.AF_UNIX)
    try:
        taken.bind("\0medpretrain-" + hashlib.sha256("|".join(same).encode()).hexdigest())
    except OSError:
        return False
    _taken = taken
    return True


def _said_on_host(text: str) -> bool:
    """Whether a process of this host has said it and is gone: rank 0 may come late, from its trackers and curves."""
    host = socket.gethostname()
    return any(row.get("time", 0) >= _started and (row.get("host"), row.get("cause")) == (host, text)
               for row in failures())  # fmt: skip


def resume_command() -> str:
    """The shell command that starts this run again as it was started, without passwords and without `--resume never`.

    Under SLURM it is the job's requeue; under torchrun the agent's command line, read from /proc.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        return f"scontrol requeue {job} (or sbatch its script again)"
    words = _torchrun() or list(sys.orig_argv)
    shown = " ".join(shlex.quote(redact(word)) for word in _to_resume(words))
    return f"cd {shlex.quote(os.getcwd())} && {shown}"


def _to_resume(words: list[str]) -> list[str]:
    """The command without a `--resume` that would refuse, or go back behind, what the run has reached."""
    committed = _run is not None and any((_run / "checkpoints").glob("step-*"))
    kept: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--resume" and (equals or words):
            value = value if equals else words.pop(0)
            if value in ("never", "auto") or committed:
                continue
            kept.append(f"--resume={value}")
        else:
            kept.append(word)
    return kept


def _torchrun() -> list[str] | None:
    """The command line of the agent that started this process; None where there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    named = any(Path(word).name == "torchrun" or word.startswith("torch.distributed.") for word in words)
    return words if named else None


def _lost_peer(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError) or _world() == 1:
        return False
    network = getattr(torch.distributed, "DistNetworkError", ())
    return isinstance(error, network) or _LOST_PEER.search(str(error)) is not None


def _its_words() -> str:
    """What the lost rank said, where the run folder tells; it may be about to say it."""
    deadline = time.monotonic() + _WAIT_FOR_CAUSE_S
    while True:
        said = [row for row in failures() if row.get("time", 0) >= _started and not row.get("consequence")]
        if said:
            return f" (rank {said[0]['rank']} on {said[0]['host']}: {said[0]['cause']})"
        if _run is None or time.monotonic() > deadline:
            return "; it said nothing in the run folder, so it was killed or its host is gone"
        time.sleep(0.1)


def failures(run: Path | None = None) -> list[dict[str, Any]]:
    """The rows of RUN/failures.jsonl; a torn line is left out."""
    run = run or _run
    return [] if run is None else read_rows(run / FAILURES_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that others append to; torn lines are left out, and so is a missing file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line in one write, on a line of its own even after a torn one."""
    with open(path, "ab+") as file:
        torn = ""
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            torn = "" if file.read(1) == b"\n" else "\n"
        file.write((torn + json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _keep(text: str, cause: Cause) -> None:
    if _run is None or not (_run / _RECIPE_FILE).is_file():
        return
    row = {"time": time.time(), "rank": _rank(), "world": _world(), "host": socket.gethostname(), "code": cause.code}
    try:
        append_row(_run / FAILURES_FILE, row | {"cause": text, "consequence": cause.consequence})
    except OSError as error:  # a full disk may be why the run ends; the cause must still be printed
        print(f"{_run / FAILURES_FILE} cannot be written: {error}", file=sys.stderr)


def _tell_torchrun(line: str, cause: Cause) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or cause.consequence:  # torchrun takes the earliest for the root cause
        return
    told = f"{cause.trace.rstrip()}\n{line}" if cause.trace else line
    extra = {"py_callstack": told, "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
    except OSError as error:
        print(f"torchrun's error file {path} cannot be written: {error}", file=sys.stderr)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
