"""A disk that is really full under a run: training goes on and says so, and goes back to normal once there is room."""

from __future__ import annotations

import contextlib
import signal
import subprocess

import pytest

from tests.faults.running import committed, events, reached, rows, steps

pytestmark = pytest.mark.distributed


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    """Leave no byte."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def test_saves_to_a_full_disk_fail_aloud_and_the_next_with_room_is_committed(runs, tmp_path, disk):
    run, to = tmp_path / "run", disk / "saves"
    faults = [{"fault": "sleep", "seconds": 0.05}]
    arguments = (f"run.dir={run}", f"checkpoint.to={to}", "train.steps=10000", "checkpoint.keep=2")
    ranks = runs.ranks(*arguments, faults=faults)
    runs.wait(reached(run, 7), ranks)
    fill(disk)
    full = steps(run)[-1]
    runs.wait(lambda: len(events(run, "save_failed")) >= 2, ranks)
    (disk / "filler").unlink()
    freed = steps(run)[-1]
    assert freed > full, "training went on"
    runs.wait(lambda: any(int(path.name[5:]) > freed for path in to.glob("step-*")), ranks)
    ranks[0].send_signal(signal.SIGTERM)
    assert runs.end(ranks) == [75, 75]

    failed = events(run, "save_failed")
    assert all(str(to) in row["cause"] and ("GB free" in row["cause"] or "No space" in row["cause"]) for row in failed)
    said = runs.said(ranks[0])
    assert f"the checkpoint of step {failed[0]['step']} could not be saved in {to}: " in said
    assert not [row for row in failed if row["step"] > freed + 5]
    assert steps(run) == list(range(1, steps(run)[-1] + 1))
    assert sorted(to.glob("step-*"))[-1].name == f"step-{steps(run)[-1]:08d}"
    assert not list(to.glob(".tmp-*"))
    assert not committed(run)


def test_metrics_of_a_full_disk_wait_and_none_is_lost_once_there_is_room(runs, tmp_path, disk):
    run, to = disk / "run", tmp_path / "saves"
    faults = [{"fault": "sleep", "seconds": 0.02}]
    arguments = (f"run.dir={run}", f"checkpoint.to={to}", "train.steps=10000", "data.trace=false", "checkpoint.keep=2")
    (rank,) = runs.ranks(*arguments, world=1, faults=faults)
    runs.wait(reached(run, 7), [rank])
    fill(disk)

    def saved():
        return max((int(path.name[5:]) for path in to.glob("step-*")), default=0)

    before = saved()
    runs.wait(lambda: saved() >= before + 60, [rank])  # far more rows than any buffer holds
    assert steps(run)[-1] < before + 30
    (disk / "filler").unlink()
    runs.wait(reached(run, before + 65), [rank])
    rank.send_signal(signal.SIGTERM)
    assert runs.end([rank]) == [75]
    last = steps(run)[-1]
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, last + 1))
    assert saved() == last
    assert runs.said(rank).count("is full: metrics wait in memory until there is room") == 1
