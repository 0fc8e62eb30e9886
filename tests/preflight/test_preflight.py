"""The command on real processes: what passes, what is found, and that nothing stays behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import UserError
from medpretrain.preflight import workers
from medpretrain.preflight.rehearsal import take_part
from medpretrain.preflight.run import _own_name, preflight
from medpretrain.preflight.workers import Work, report_file
from medpretrain.recipe_file import dump_recipe, load_recipe
from medpretrain.training.loop import train
from tests.preflight.tiny import write_recipe

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, small_dataset):
    """recipe(*overrides)"""
    file = write_recipe(tmp_path, small_dataset)
    return lambda *overrides: load_recipe(str(file), overrides)


def by_check(told):
    found = {}
    for row in told["rows"]:
        found.setdefault(row["check"], []).append(row)
    return found


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_two_processes_rehearse_what_training_then_does(recipe, tmp_path, capsys):
    before, processes = sorted(tmp_path.iterdir()), children()
    out = tmp_path / "preflight.json"
    assert preflight(recipe(), gpus=2, json_file=out)
    assert sorted(tmp_path.iterdir()) == sorted([*before, out]), "nothing is written to the run folder or beside it"
    assert children() == processes
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    assert told["passed"]
    rows = by_check(told)
    assert {"hosts", "packages", "GPUs", "dataset", "checkpoint target", "all-reduce", "total time"} <= rows.keys()
    assert not [row for row in told["rows"] if row["status"] in ("fail", "not measured")]
    for check in rows:
        assert check in printed
    assert [one["rank"] for one in told["reports"]] == [0, 1]
    for one in told["reports"]:
        assert one["all_reduce_right"]
        assert one["all_gather_right"]
        assert one["all_reduce"]["bus_bytes_s"] > 0
        steps = one["rehearsed"]
        assert (steps["images"], steps["steps"], steps["not_finite"], steps["replaced"]) == (4, 30, 0, 0)
        assert 0 < steps["step_s"] < steps["first_s"] + steps["step_s"]
        assert steps["resident_bytes"] > 50e6
    # What a checkpoint takes is what a run then writes, but for the header of a second file.
    finished = train(recipe("train.steps=1", "data.trace=false"))
    written = sum(file.stat().st_size for file in Path(finished.checkpoint).glob("*.safetensors"))
    assert sum(one["rehearsed"]["checkpoint_bytes"] for one in told["reports"]) == pytest.approx(written, rel=0.02)


def test_what_training_would_refuse_is_reported_in_its_words(recipe, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    work = Work(dump_recipe(recipe("data.labels=[klass]")), "here", os.getpid(), 60.0)
    assert take_part(work, tmp_path) == 2
    told = json.loads(report_file(tmp_path, 0).read_text())
    assert (told["host"], told["stage"]) == ("here", "building the networks")
    assert "there is no label 'klass'" in told["error"]
    assert not told["consequence"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_is_checked_as_train_would(recipe, tmp_path):
    run, out = tmp_path / "run", tmp_path / "preflight.json"
    train(recipe("train.steps=20", "data.trace=false"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    def failure(*overrides, **options):
        passed = preflight(recipe(*overrides), gpus=1, json_file=out, **options)
        (row,) = (row for row in json.loads(out.read_text())["rows"] if row["check"] == "rehearsal")
        assert passed == (row["status"] == "pass")
        return row["figures"] if not passed else None

    assert "is of another recipe: optim.lr was 0.01 and is 0.5" in failure("optim.lr=0.5", override=("train.steps",))
    assert failure("optim.lr=0.5", override=("train.steps", "optim.lr")) is None
    (total,) = (row for row in json.loads(out.read_text())["rows"] if row["check"] == "total time")
    assert "for the last 10 of 30 steps" in total["figures"]
    with (run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another process is training in {run}" in failure(override=("train.steps",))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "nothing is touched"


def test_a_folder_of_something_else_is_found(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    out = tmp_path / "preflight.json"
    assert not preflight(recipe(), gpus=1, json_file=out)
    (row,) = (row for row in json.loads(out.read_text())["rows"] if row["status"] == "fail")
    assert "holds something that is not a run; give another folder" in row["figures"]


def test_a_process_that_was_killed_is_the_cause_and_not_those_that_are_ended_for_it(monkeypatch, recipe, tmp_path):
    """The first is what the kernel does when memory is short; the others hang until they are ended."""
    monkeypatch.setattr(workers, "_GRACE_S", 1.0)

    def stand_in(folder, rank, *where):
        end = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)" if rank == 1 else "import time; time.sleep(99)"
        return subprocess.Popen([sys.executable, "-c", end], start_new_session=True)

    monkeypatch.setattr(workers, "_start", stand_in)
    monkeypatch.setattr(workers, "_log", lambda folder, rank: Path(os.devnull))
    told = workers.rehearse_here(
        recipe(), host="a", node=0, nodes=1, processes=2, master=("127.0.0.1", 1), limit_s=60.0
    )
    assert [one.consequence for one in told] == [True, False]
    assert "was ended by SIGKILL (out of memory?)" in told[1].error


def test_a_table_that_could_not_be_written_is_refused_before_anything_is_looked_at(recipe, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "table.json", tmp_path):
        with pytest.raises(UserError, match="--json "):
            preflight(recipe(), json_file=path)


def test_a_rehearsal_that_takes_too_long_is_ended(recipe, tmp_path):
    processes, out = children(), tmp_path / "preflight.json"
    assert not preflight(recipe(), gpus=2, rehearsal_s=0.5, json_file=out)
    assert children() == processes
    (row,) = (row for row in json.loads(out.read_text())["rows"] if row["status"] == "fail")
    assert row["check"] == "rehearsal"
    assert "rank 0, 1: starting took longer than 0 s" in row["figures"]


def test_a_host_alone_asks_no_other_and_rehearses_nothing(recipe, tmp_path):
    out = tmp_path / "preflight.json"
    assert preflight(recipe(), local=True, nodes=4, verify_shards=None, json_file=out)
    told = json.loads(out.read_text())
    assert told["reports"] is None
    assert {"packages", "dataset", "checkpoint target"} <= by_check(told).keys()
    assert "rehearsal" not in by_check(told)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 2}, "--head HOST:PORT"),
        ({"nodes": 2, "head": "node1"}, "HOST:PORT"),
        ({"nodes": 3, "hosts": ("a", "b"), "head": "a:1"}, "--hosts names 2 hosts, and --nodes is 3"),
        ({"hosts": ("a", "a"), "head": "a:1"}, "twice"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(recipe, options, words):
    with pytest.raises(UserError, match=words):
        preflight(recipe(), **options)


def test_a_host_is_called_as_the_list_calls_it(monkeypatch):
    monkeypatch.setattr("medpretrain.preflight.run.socket.gethostname", lambda: "n1.cluster.org")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert _own_name(["n1", "n2"]) == "n1"
    assert _own_name(["n2", "n1.cluster.org"]) == "n1.cluster.org"
    assert _own_name(["m1", "m2"]) == "n1.cluster.org"
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    assert _own_name(["n1", "n2"]) == "n2"


def test_no_dataset_is_refused(recipe):
    with pytest.raises(UserError, match="names no dataset"):
        preflight(recipe("data.path=[]"))


@pytest.fixture
def agents(tmp_path):
    """agents(name, *words, path=None) starts `medpretrain preflight`; all are ended with the test."""
    started = []

    def start(name, *words, path=()):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]), "COLUMNS": "250"}
        environment = {key: value for key, value in environment.items() if not key.startswith("SLURM")}
        log = (tmp_path / f"{name}.log").open("wb")
        command = [sys.executable, "-m", "medpretrain", "preflight", *map(str, words), "--name", name]
        with log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_processes_of_the_rehearsal_do_not_outlive_a_killed_agent(agents, tmp_path, small_dataset):
    agent = agents("here", write_recipe(tmp_path, small_dataset))
    listed = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    deadline = time.monotonic() + 120
    workers = []
    while not workers:
        assert agent.poll() is None, (tmp_path / "here.log").read_text()
        assert time.monotonic() < deadline
        workers = [pid for pid in listed.read_text().split() if b"preflight.worker" in cmdline(pid)]
        time.sleep(0.05)
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if b"preflight.worker" in cmdline(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def test_another_version_a_missing_dataset_and_a_missing_host_are_all_named_at_once(agents, tmp_path, small_dataset):
    fake, empty, out = tmp_path / "fake", tmp_path / "empty", tmp_path / "preflight.json"
    (fake / "timm-0.0.1.dist-info").mkdir(parents=True)
    (fake / "timm-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    empty.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    words = (write_recipe(tmp_path, small_dataset), "--hosts", "a,b,c", "--timeout", 15, "--json", out)
    one = agents("a", *words, "--head", head)
    other = agents("b", *words, f"data.path={empty}", "--head", head, path=[fake])
    said = {name: tmp_path / f"{name}.log" for name in ("a", "b")}
    assert one.wait(120) == 1, said["a"].read_text()
    assert other.wait(30) == 1, said["b"].read_text()
    told = json.loads(out.read_text())
    names = {one["name"] for one in told["hosts"]["seen"]}
    first = told["hosts"]["seen"][0]["name"]  # whoever came first to the port of this one machine
    assert names == {"a", "b"}
    failed = {(row["check"], row["host"]): row["figures"] for row in told["rows"] if row["status"] == "fail"}
    assert failed["hosts", "c"] == "did not answer"
    assert "no prepared dataset" in failed["dataset", "b"]
    named = {host: figures for (check, host), figures in failed.items() if check == "packages"}
    (other_version,) = named.values()
    assert list(named) == [({"a", "b"} - {first}).pop()], "of two, the head's is the right one"
    assert other_version.startswith("timm ")
    assert "0.0.1" in other_version
    assert [row["status"] for row in told["rows"] if row["check"] == "clock"] == ["pass"]
    assert told["reports"] is None, "nothing is rehearsed where a host fails"
    assert "look at c" in said[first].read_text()
    assert "no prepared dataset" in said["b"].read_text(), "a host sees its own failures"
    for name in ("a", "b"):
        assert "Traceback" not in said[name].read_text()
        assert "waitForInput" not in said[name].read_text()
