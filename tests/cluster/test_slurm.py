"""`medpretrain launch slurm` on a real SLURM of two nodes: whatever takes the nodes away, the run goes on by itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.running import ROOT, assert_identical, committed, events, reached, rows, seen, steps, write_recipe

pytestmark = pytest.mark.cluster
MEDPRETRAIN = (sys.executable, "-m", "medpretrain")
SITE = """\
gpus: 1
environment: {PYTHONPATH: %s, OMP_NUM_THREADS: "1"}
slurm: {gpu_option: none, signal_s: 10}
"""
EVERY = "checkpoint.every=20"
STEPS = 200


@pytest.fixture
def site(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(SITE % ROOT)
    return path


def launched(slurm, site, *words, cwd):
    """The number of the job that `medpretrain launch slurm` submits."""
    answer = slurm.run(*MEDPRETRAIN, "launch", "slurm", *words, "--nodes", "2", "--site", site, "--no-follow", cwd=cwd)
    assert answer.returncode == 0, answer.stderr
    first = answer.stdout.split()
    assert first[0] == "job"
    return int(first[1].rstrip(":"))


def undisturbed(hosts, recipe, run, *options):
    """The same run on the same nodes without SLURM."""
    ranks = []
    for rank, name in enumerate(("a", "b")):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29600"}
        ranks.append(
            hosts[name].start(
                [*MEDPRETRAIN, "train", recipe, f"run.dir={run}", *options],
                env=place | {"PYTHONPATH": str(ROOT)},
                cwd=run.parent,
            )
        )
    for process in ranks:
        assert process.wait(120) == 0, process.said()


def until(happens, log, timeout=120):
    deadline = time.monotonic() + timeout
    while not happens():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:] if log.exists() else "no log"
        time.sleep(0.1)


def assert_like_undisturbed(run, other, total):
    assert steps(run) == list(range(1, total + 1))
    assert seen(run, total) == seen(other, total)
    assert_identical(run, other)


def test_a_pre_empted_run_that_then_loses_a_node_ends_like_an_undisturbed_one(
    slurm, hosts, site, small_dataset, tmp_path
):
    file = write_recipe(tmp_path, small_dataset, STEPS)
    undisturbed(hosts, file, tmp_path / "undisturbed", EVERY)
    run = tmp_path / "run"
    job = launched(slurm, site, file, f"run.dir={run}", EVERY, "--no-preflight", cwd=tmp_path)
    log = tmp_path / "run.launch" / f"slurm-{job}.out"

    until(reached(run, 30), log)
    at = steps(run)[-1]
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.wait(urgent, "COMPLETED", timeout=120)
    (left,) = events(run, "preempted")
    assert left["step"] >= at
    assert committed(run)[-1] == left["step"], "nothing is lost"

    until(reached(run, left["step"] + 30), log)
    hosts["b"].lose()
    lost_at = committed(run)[-1]
    until(lambda: slurm.state(job) == "PENDING", log)
    hosts["b"].up()
    slurm.start_node(hosts["b"])

    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=180) == "COMPLETED", log.read_text()[-3000:]
    starts = [row["step"] for row in rows(run / "starts.jsonl")]
    assert starts[:2] == [0, left["step"]]
    assert len(starts) == 3
    assert starts[2] >= lost_at
    assert_like_undisturbed(run, tmp_path / "undisturbed", STEPS)


def test_a_run_longer_than_its_time_limit_is_followed_to_its_end(slurm, hosts, site, small_dataset, tmp_path):
    total = 300
    file, run = write_recipe(tmp_path, small_dataset, total), tmp_path / "run"
    words = [*MEDPRETRAIN, "launch", "slurm", file, f"run.dir={run}", EVERY, "--no-preflight"]
    words += ["--nodes", "2", "--time", "1", "--site", site]
    # On a slow network a step takes 0.3 s, so that the limit comes before the end however fast this machine is.
    hosts["b"].slow(40)
    launch = hosts["login"].start(words, env=slurm.environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    while launch.poll() is None:
        if events(run, "preempted"):
            hosts["b"].unslow()
            break
        time.sleep(0.5)
    assert launch.wait(300) == 0, launch.said()[-3000:]
    # SLURM may ask before the ranks listen, which costs a start and no step.
    left = [row["step"] for row in events(run, "preempted")]
    assert 1 <= len(left) <= launch.said().count("back into the queue: job")
    assert 0 < left[0] < total
    assert [row["step"] for row in rows(run / "starts.jsonl")] == [0, *left], "not a step is done twice"
    assert steps(run) == list(range(1, total + 1))
    assert f"{total} steps done" in launch.said()


def test_a_cancelled_run_stays_cancelled_and_has_its_checkpoint(slurm, hosts, site, small_dataset, tmp_path):
    file, run = write_recipe(tmp_path, small_dataset, 100_000), tmp_path / "run"
    job = launched(slurm, site, file, f"run.dir={run}", EVERY, cwd=tmp_path)
    log = tmp_path / "run.launch" / f"slurm-{job}.out"
    until(reached(run, 25), log)
    assert "preflight of 2 hosts: " in log.read_text(), "the gate"
    assert slurm.run("scancel", str(job)).returncode == 0
    assert slurm.wait(job, "CANCELLED", timeout=60) == "CANCELLED"
    until(lambda: slurm.node_states() == {"a": "idle", "b": "idle"}, log)
    assert slurm.state(job) == "CANCELLED"
    assert committed(run)[-1] == steps(run)[-1]


def test_an_array_of_four_parts_gives_the_bytes_of_one_process(slurm, site, tmp_path):
    draw = np.random.default_rng(3)
    for number in range(40):
        folder = tmp_path / "pictures" / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / f"{number}.png")
    words = ["--split", "train=0.8,test=0.2", "--shard-size", "4"]
    single = slurm.run(*MEDPRETRAIN, "prep", "images", "pictures", "single", *words, cwd=tmp_path, timeout=60)
    assert single.returncode == 0, single.stderr
    launch = [*MEDPRETRAIN, "launch", "prep", "slurm", "--parts", "4", "--site", site]
    answer = slurm.run(*launch, "images", "pictures", "parts", *words, cwd=tmp_path, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    logs = sorted((tmp_path / "parts.launch").glob("slurm-*_*.out"))
    assert len(logs) == 4
    assert contents(tmp_path / "parts") == contents(tmp_path / "single")


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
