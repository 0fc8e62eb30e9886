"""Real processes on loopback, each with its own data."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def run_ranks():
    """run_ranks(arguments, world): `python *arguments` as each rank of a gloo group; all must end with 0."""

    def run(arguments: list[str], world: int, *, timeout: float = 120) -> None:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": "1"}
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
            )
            for rank in range(world)
        ]
        try:
            assert [process.wait(timeout=timeout) for process in processes] == [0] * world
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    return run
