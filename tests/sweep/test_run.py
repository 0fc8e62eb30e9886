"""If these fail, a sweep repeats what is done, loses what is not, or hides what went wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.errors import UserError
from medpretrain.recipe_file import load_recipe
from medpretrain.sweep.expand import expand, words
from medpretrain.sweep.folder import Folder, planned
from medpretrain.sweep.results import results_of
from medpretrain.sweep.run import Work, evaluation_name, execute, refuse_launch
from medpretrain.sweep.sweep_file import Evaluate, Sweep

GRID = [{"name": "batch", "set": ["train.global_batch={}"], "values": [4, 6, 8]}]
LINEAR = {"protocol": "linear", "variant": "exact"}
DATA = ["data.path=shards"]
NAMES = ["batch-4", "batch-6", "batch-8"]


def sweep(**content) -> Sweep:
    return Sweep.model_validate(
        {"name": "mine", "recipe": "simclr_medmnist", "grid": GRID, "evaluate": [LINEAR], **content}
    )


@pytest.fixture
def go(tmp_path, program):
    """go(sweep) -> the outcome of it, in one folder."""

    def go(one=None, jobs=1, only=None, overrides=DATA):
        one, folder = one or sweep(), Folder(tmp_path / "out")
        runs = expand(one, overrides)
        works = [Work.of(one, run, planned(run), folder, program=program) for run in runs]
        folder.write_plan(one, runs)
        return execute([work for work in works if only in (None, work.planned.number)], folder, jobs)

    return go


@pytest.fixture
def states(tmp_path):
    return lambda: [row.state for row in results_of(Folder(tmp_path / "out")).rows]


def started(calls):
    """What was started: (command, run)."""
    return [(call[0], call[2] if call[0] == "evaluate" else call[-1].removeprefix("run.dir=")) for call in calls()]


def test_each_run_is_trained_then_evaluated_and_not_again(go, calls, states, tmp_path):
    assert go().done == NAMES
    folders = [str(tmp_path / "out" / name) for name in NAMES]
    assert started(calls) == [(command, run) for run in folders for command in ("train", "evaluate")]
    assert states() == ["done"] * 3
    assert go().done == NAMES
    assert not calls()


def test_only_what_is_missing_is_done(go, calls, states, tmp_path):
    go()
    calls()
    out = tmp_path / "out"
    (out / "batch-4" / "evaluation" / "linear-exact-class.evaluation.json").unlink()
    (out / "batch-6" / "recipe.yaml").unlink()
    assert states() == ["trained", "not done", "done"]
    go()
    assert started(calls) == [
        ("evaluate", str(out / "batch-4")),
        ("train", str(out / "batch-6")),
        ("evaluate", str(out / "batch-6")),
    ]
    assert states() == ["done"] * 3


def test_another_evaluation_or_value_is_added_without_repeating_the_others(go, calls, tmp_path):
    go()
    calls()
    more = sweep(grid=[{**GRID[0], "values": [4, 6, 8, 10]}], evaluate=[LINEAR, {"protocol": "knn", "fractions": [10]}])
    go(more)
    said = [call[:2] for call in calls()]
    assert said == [["evaluate", "knn"]] * 3 + [
        ["train", "simclr_medmnist"],
        ["evaluate", "linear"],
        ["evaluate", "knn"],
    ]


def test_a_run_of_a_changed_recipe_is_not_done(go, calls, states):
    go()
    calls()
    go(sweep(overrides=["optim.lr=0.1"]), only=1)
    assert [call[0] for call in calls()] == ["train", "evaluate"]
    assert states() == ["not done", "done", "not done"]


def test_a_failed_run_is_said_and_the_others_go_on(go, calls, states, tmp_path):
    (tmp_path / "fail-batch-6").touch()
    outcome = go()
    assert outcome.done == ["batch-4", "batch-8"]
    assert outcome.failed == {"batch-6": "train ended with 1: error: nothing but bad luck"}
    assert not outcome.stopped
    assert states() == ["done", "not done", "done"]
    calls()
    (tmp_path / "fail-batch-6").unlink()
    assert go().failed == {}
    assert [call[0] for call in calls()] == ["train", "evaluate"]


def test_an_evaluation_that_leaves_nothing_has_failed(go, tmp_path, states, monkeypatch):
    monkeypatch.setattr("medpretrain.sweep.run._Runner._files", lambda self: {})
    assert "left no file" in go(only=0).failed["batch-4"]
    assert states()[0] == "trained"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_is_passed_on_and_the_same_command_goes_on(jobs, go, calls, states, tmp_path):
    (tmp_path / "wait-batch-6").touch()

    def when_waiting():
        while not (tmp_path / "waiting-batch-6").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=when_waiting)
    asking.start()
    began = time.monotonic()
    outcome = go(jobs=jobs)
    asking.join()
    assert outcome.stopped
    assert "batch-6" not in outcome.done
    assert not outcome.failed
    assert time.monotonic() - began < 30
    assert states()[1] == "not done"
    if jobs == 1:
        assert outcome.done == ["batch-4"]
        assert [call[0] for call in calls()] == ["train", "evaluate", "train"]  # no further run was started
    (tmp_path / "wait-batch-6").unlink()
    assert sorted(go().done) == NAMES
    assert states() == ["done"] * 3


def test_a_run_that_was_asked_to_leave_by_somebody_else_stops_the_sweep(tmp_path):
    stand_in = tmp_path / "leaves.py"
    stand_in.write_text("raise SystemExit(75)")
    one, folder = sweep(), Folder(tmp_path / "other")
    runs = expand(one, DATA)
    folder.write_plan(one, runs)
    works = [Work.of(one, run, planned(run), folder, program=[sys.executable, str(stand_in)]) for run in runs]
    outcome = execute(works, folder)
    assert outcome.stopped
    assert not outcome.failed
    assert len(list(folder.path.glob("*.log"))) == 1


def test_two_at_a_time_are_two_and_no_more(go, tmp_path, states):
    for name in NAMES:
        (tmp_path / f"wait-{name}").touch()
    seen = []

    def when_waiting():
        while len(seen) < 2:
            seen[:] = sorted(path.name for path in tmp_path.glob("waiting-*"))
            time.sleep(0.02)
        time.sleep(0.5)
        seen[:] = sorted(path.name for path in tmp_path.glob("waiting-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=when_waiting)
    asking.start()
    assert go(jobs=2).stopped
    asking.join()
    assert seen == ["waiting-batch-4", "waiting-batch-6"]


def test_a_folder_with_a_space_is_one_word_of_yaml(tmp_path):
    (run, *_) = expand(sweep(), DATA)
    for folder in (tmp_path / "my runs: 2", tmp_path / "plain", Path("1e3/2")):
        recipe, *overrides = words(run, folder)
        assert load_recipe(recipe, overrides).run_dir == folder


def test_a_folder_of_something_else_is_refused(go, tmp_path):
    go(only=0)
    with pytest.raises(UserError, match="holds the sweep 'mine', not 'other'"):
        go(sweep(name="other"))
    runs = expand(sweep(), DATA)
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "letter.txt").touch()
    for place, message in (("things", "not a sweep"), ("things/letter.txt", "is a file")):
        with pytest.raises(UserError, match=message):
            Folder(tmp_path / place).write_plan(sweep(), runs)


def test_a_sweep_without_data_or_with_data_that_no_evaluation_names_is_refused(go):
    with pytest.raises(UserError, match=r"names no dataset; give one, as in data\.path="):
        go(overrides=[])
    with pytest.raises(UserError, match="2 datasets are trained on; say in evaluate"):
        go(overrides=["data.path=[a, b]"])
    assert go(sweep(evaluate=[{**LINEAR, "dataset": "a"}]), overrides=["data.path=[a, b]"]).done == NAMES


def test_the_name_of_an_evaluation_says_all_but_where_things_are():
    assert evaluation_name(Evaluate(protocol="linear", variant="exact")) == "linear --label class --variant exact"
    assert evaluation_name(Evaluate(protocol="knn", dataset="other")) == "knn other --label class"


def test_a_launcher_that_does_not_wait_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--launch slurm: it can be torchrun or deepspeed; .*--only"):
        refuse_launch(["slurm", "--nodes", "2"])
    (run, *_) = expand(sweep(), DATA)
    work = Work.of(sweep(), run, planned(run), Folder(tmp_path), ["torchrun", "--gpus", "2"], program=["medpretrain"])
    assert work.steps[0].command[:5] == ("medpretrain", "launch", "torchrun", "--gpus", "2")
    assert work.steps[1].command[:2] == ("medpretrain", "evaluate")
