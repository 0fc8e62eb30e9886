"""Processes that have the imports behind them, for what starts hundreds of them.

Importing torch, timm and DALI takes ten seconds of a core. One process does it (multiprocessing's fork server), and
each that is started here is forked from it: a process, session and process group of its own that runs the same `main`
with its own arguments, environment and output, and that can be signalled and killed like any other. What a start from
nothing would do besides is only the imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["medpretrain.cli", "medpretrain.training.loop", "nvidia.dali.plugin.pytorch"])


class Started:
    """`python -m medpretrain ARGUMENTS`, or `python SCRIPT ARGUMENTS`; the calls are those of `subprocess.Popen`.

    Args:
        log: where standard output and error go.
        environment: all of it.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, script: Path | None = None
    ) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so by the server
        self._process = _CONTEXT.Process(
            target=_run, args=(list(arguments), dict(environment), str(log), script and str(script)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, -N after signal N.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to the process and all that it started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it is not yet a group of its own
                os.kill(self.pid, signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], log: str, script: str | None) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if script is None:
        from medpretrain.cli import main

        sys.argv = ["medpretrain", *arguments]
        sys.orig_argv = [sys.executable, "-m", *sys.argv]
        main()
    else:
        sys.argv = [script, *arguments]
        sys.orig_argv = [sys.executable, *sys.argv]
        runpy.run_path(script, run_name="__main__")
