"""Work on a Dask cluster, a real one on loopback, and on any executor: a local run's bytes, and no name in a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from distributed import Client

from data_prep.errors import UserError, WorkFailed
from data_prep.images import prepare
from data_prep.options import Progress
from data_prep.pool import open_engine

Draw = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]
SENTINEL = "Mustermann"


class Cluster:
    """A scheduler and its workers, each a process group of its own; what they say goes to files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        where = folder / "scheduler.json"
        self.scheduler = self.start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(where)
        )
        while not where.exists() or b'"address"' not in where.read_bytes():
            assert self.scheduler.poll() is None
            time.sleep(0.02)
        self.address = where.read_bytes().partition(b'"address": "')[2].partition(b'"')[0].decode()

    def start(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        command = [sys.executable, "-m", f"distributed.cli.{what}", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "1"
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.folder
        )
        self.processes.append(process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        how = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
        return self.start("dask_worker", self.address, *how, "--local-directory", str(self.folder))

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                self.kill(process)

    def logs(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask"))
    try:
        made.worker()
        made.worker()
        yield made
    finally:
        made.close()


@pytest.fixture
def named(tree: Path) -> Path:
    """Images with a patient's name in folder and file, some of them broken."""
    for number in range(3):
        (tree / "cat" / f"{SENTINEL}_{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return tree.rename(tree.with_name(f"{SENTINEL}_tree"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def shouts(item: int) -> int:
    """Fails in all the ways in which a name could come into a log."""
    name = f"/{SENTINEL}/{item}"
    if item == 1:
        Path(name).read_bytes()
    if item == 2:
        raise type("Unpicklable", (Exception,), {})(name)
    warnings.warn_explicit(name, UserWarning, "x.py", 1, module="PIL.Image")
    return item


def shout(item: int) -> int:
    return shouts(item)


def test_a_cluster_gives_the_bytes_of_a_local_run(
    named: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(named, tmp_path / "local", shard_size=3)
    monkeypatch.chdir(tmp_path)  # workers are elsewhere
    summary = prepare(Path(named.name), Path("out"), shard_size=3, cluster=cluster.address)
    assert summary.info.quarantined == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert contents(tmp_path / "out.private") == contents(tmp_path / "local.private")
    logs = cluster.logs()
    assert "Registered to" in logs
    assert SENTINEL not in logs
    assert str(tmp_path) not in logs


def test_nothing_that_goes_wrong_in_a_worker_comes_into_its_log(cluster: Cluster) -> None:
    with open_engine(1, cluster.address) as engine:
        assert list(engine.map(shout, iter([0]))) == [0]
        for item, error in ((1, FileNotFoundError), (2, RuntimeError)):
            with pytest.raises(error, match=SENTINEL) as caught:
                list(engine.map(shout, iter([item])))
            assert "in shouts" in caught.value.__notes__[0]  # where it was
    assert SENTINEL not in cluster.logs()


def test_work_of_a_killed_worker_is_done_by_the_others(named: Path, tmp_path: Path, cluster: Cluster) -> None:
    extra, killed = cluster.worker(), False

    def kill(now: Progress) -> None:
        nonlocal killed
        if now.done >= 6 and not killed:
            cluster.kill(extra)
            killed = True

    with Client(cluster.address, set_as_default=False) as client:
        client.wait_for_workers(3)
    prepare(named, tmp_path / "out", shard_size=1, cluster=cluster.address, on_progress=kill)
    prepare(named, tmp_path / "local", shard_size=1)
    assert killed
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert SENTINEL not in cluster.logs()


def test_a_cluster_that_goes_away_fails_the_run_and_it_goes_on(named: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dask"
    folder.mkdir()
    cluster = Cluster(folder)
    try:
        cluster.worker()

        def away(now: Progress) -> None:
            if now.done >= 6:
                cluster.close()

        with pytest.raises(WorkFailed, match="what is done is kept"):
            prepare(named, tmp_path / "out", shard_size=1, cluster=cluster.address, on_progress=away)
    finally:
        cluster.close()
    first: list[Progress] = []
    prepare(named, tmp_path / "out", shard_size=1, on_progress=first.append)
    prepare(named, tmp_path / "local", shard_size=1)
    assert first[0].done >= 1
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_without_a_scheduler_the_user_is_told(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.pool.PATIENCE", 0.5)
    with pytest.raises(UserError, match=r"--cluster tcp://127\.0\.0\.1:9: no Dask scheduler answers"):
        prepare(tree, tmp_path / "out", cluster="tcp://127.0.0.1:9")
    with pytest.raises(UserError, match=r"--cluster nonsense://x: no Dask scheduler answers"):
        prepare(tree, tmp_path / "out", cluster="nonsense://x")
    assert os.listdir(tmp_path) == ["tree"]
    folder = tmp_path / "dask"
    folder.mkdir()
    empty = Cluster(folder)
    try:
        with pytest.raises(UserError, match="the scheduler has no workers"):
            prepare(tree, tmp_path / "out", cluster=empty.address)
    finally:
        empty.close()


def test_any_executor_does(tree: Path, tmp_path: Path) -> None:
    prepare(tree, tmp_path / "local", shard_size=3)
    with ThreadPoolExecutor(3) as threads:
        prepare(tree, tmp_path / "out", shard_size=3, executor=threads, workers=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_worker_that_does_not_see_the_source_or_the_folder_fails(tree: Path, tmp_path: Path) -> None:
    def unmounted(now: Progress) -> None:
        if now.done >= 6:
            tree.rename(tmp_path / "away")

    with pytest.raises(WorkFailed, match="tree cannot be seen by a worker"):
        prepare(tree, tmp_path / "out", shard_size=3, on_progress=unmounted)
    (tmp_path / "away").rename(tree)
    summary = prepare(tree, tmp_path / "out", shard_size=3)
    assert (summary.info.samples, summary.info.quarantined) == (24, 0)
