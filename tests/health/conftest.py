"""Real ranks of worker.py, to which the tests do what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "worker.py"


class Ranks:
    """The processes of one run; `run` is its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.processes: list[subprocess.Popen] = []

    def start(self, world: int = 2, env: dict[str, str] | None = None, extra: tuple[str, ...] = (), **options) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        place |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        for rank in range(world):
            self._open(
                [sys.executable, str(WORKER), *self._arguments(options), *extra],
                place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (env or {}),
            )
        return self

    def torchrun(self, world: int = 2, flags: tuple[str, ...] = (), **options) -> Ranks:
        launch = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        self._open(
            [sys.executable, *launch, f"--nproc-per-node={world}", *flags, str(WORKER), *self._arguments(options)], {}
        )
        return self

    def _arguments(self, options: dict) -> list[str]:
        return [str(self.run), *(f"{key}={value}" for key, value in options.items())]

    def _open(self, command: list[str], env: dict[str, str]) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with open(self.folder / f"errors{len(self.processes)}", "w") as errors:
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=inherited | own | env,
                    stdout=errors,
                    stderr=errors,
                    start_new_session=True,
                    cwd=self.folder,
                )
            )

    def steps(self, rank: int = 0) -> list[tuple[int, float]]:
        path = self.folder / f"rank{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(words[0]), float(words[1])) for words in map(str.split, lines) if len(words) == 2]

    def wait_for_steps(self, count: int, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while len(self.steps()) < count:
            assert time.monotonic() < deadline, self.errors(0)
            assert all(process.poll() is None for process in self.processes), self.errors(0)
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def wait(self, rank: int, timeout: float = 60) -> int:
        try:
            return self.processes[rank].wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"process {rank} does not end: {self.errors(rank)[-2000:]}")

    def errors(self, rank: int) -> str:
        return (self.folder / f"errors{rank}").read_text()

    def last_line(self, rank: int) -> str:
        return (self.errors(rank).strip().splitlines() or [""])[-1]

    def rows(self, name: str) -> list[dict]:
        path = self.run / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def ranks(tmp_path):
    """ranks.start(world, key=value ...) starts worker.py as each rank, ranks.torchrun under an agent."""
    started = Ranks(tmp_path)
    yield started
    started.close()
