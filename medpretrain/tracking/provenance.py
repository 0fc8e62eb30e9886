"""Where a run's numbers come from: what was installed, which code, which data, which command, at each of its starts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import medpretrain
from data_prep.errors import UserError
from medpretrain.recipe import Recipe
from medpretrain.tracking.redaction import redact
from medpretrain.tracking.state import write_whole

PROVENANCE_FILE, ENVIRONMENT_FILE, ENVIRONMENT_GLOB = "provenance.json", "environment.txt", "environment*.txt"
IMAGE_REVISION = "MEDPRETRAIN_REVISION"
"""The variable in which an image holds its commit; `unknown` if it was built without one."""
_GIT_S = 10.0


def write_provenance(
    run: Path, recipe: Recipe, dataset_sha256: Sequence[str], *, world_size: int, command: Sequence[str] | None = None
) -> list[Path]:
    """Write down a start of a run: `environment.txt`, and an entry in the `starts` of `provenance.json`.

    The environment is what is installed, as `name==version`, under comments for Python, platform, CUDA and GPUs. If a
    resumed run finds another one, that of start N before it becomes `environment-N.txt`. Called by rank 0 alone.

    Args:
        run: the run folder.
        recipe: the recipe as it is trained.
        dataset_sha256: the hash of each dataset of `recipe.data.path`.
        world_size: processes that train.
        command: how it was started; None: this process's own command line.

    Returns:
        The files to attach.

    Raises:
        UserError: provenance.json is there and broken.
    """
    path = run / PROVENANCE_FILE
    starts = _starts(path)
    environment = _environment()
    file = run / ENVIRONMENT_FILE
    if file.exists() and file.read_text(encoding="utf-8") != environment:
        os.replace(file, run / f"environment-{len(starts)}.txt")
    write_whole(file, environment)
    starts.append(
        {
            "time": time.time(),
            "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": redact(shlex.join(sys.orig_argv if command is None else command)),
            "host": socket.gethostname(),
            "medpretrain": medpretrain.__version__,
            "git": _git(Path(medpretrain.__file__).resolve().parents[1]) or _git_of_image(),
            "recipe": recipe.name,
            "recipe_sha256": recipe.sha256,
            "datasets": [
                {"path": redact(name), "sha256": sha256}
                for name, sha256 in zip(recipe.data.path, dataset_sha256, strict=True)
            ],
            "world_size": world_size,
            "strategy": recipe.strategy,
            "environment_sha256": hashlib.sha256(environment.encode()).hexdigest(),
        }
    )
    write_whole(path, json.dumps({"starts": starts}, indent=2) + "\n")
    return [path, *sorted(run.glob(ENVIRONMENT_GLOB))]


def dataset_hashes(run: Path) -> list[str]:
    """Of the datasets of a run's last start, in their order; none for a run that wrote none down.

    Raises:
        UserError: provenance.json is broken.
    """
    starts = _starts(run / PROVENANCE_FILE)
    return [dataset["sha256"] for dataset in starts[-1]["datasets"]] if starts else []


def first_start(run: Path) -> float | None:
    """When a run was first started, in seconds since 1970; None for a run that did not write it down.

    Raises:
        UserError: provenance.json is broken.
    """
    starts = _starts(run / PROVENANCE_FILE)
    return float(starts[0]["time"]) if starts else None


def _starts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        starts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["starts"]
        assert all({"time", "datasets"} <= set(start) for start in starts)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is broken ({type(error).__name__}: {error}); move it away") from None
    return starts


def _environment() -> str:
    installed = {f"{one.name.lower()}=={one.version}" for one in importlib.metadata.distributions() if one.name}
    facts = [f"python {platform.python_version()} ({platform.python_implementation()})", platform.platform(), *_cuda()]
    return "".join(f"# {fact}\n" for fact in facts) + "".join(f"{one}\n" for one in sorted(installed))


def _cuda() -> list[str]:
    torch = sys.modules.get("torch")  # whoever trains has it; nobody else pays for it
    if torch is None:
        return []
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"CUDA {torch.version.cuda}", *(f"GPU {index}: {name}" for index, name in enumerate(names))]


def _git(root: Path) -> dict[str, Any] | None:
    """Commit, and whether files differ from it; None if the package does not run from a checkout of its own."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_S, check=True
        )
        return done.stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_of_image() -> dict[str, Any] | None:
    """The commit an image was built from, as whoever built it said; whether files differed from it nobody knows."""
    commit = os.environ.get(IMAGE_REVISION, "unknown")
    return None if commit == "unknown" else {"commit": commit, "dirty": None}
