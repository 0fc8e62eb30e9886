"""`medpretrain train` ends with the exit code and the last line that its error calls for."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from data_prep.errors import UserError, WorkFailed
from medpretrain import cli
from medpretrain.health import last_words
from medpretrain.health.exits import Exit
from medpretrain.health.preemption import Preempted
from medpretrain.health.restarts import NoProgress

RECIPE = """\
name: small
backbone: {name: test_resnet}
views: {crop: {size: 32, count: 2}}
method: {name: simclr}
optim: {name: sgd, lr: 0.01}
train: {steps: 3, global_batch: 8}
"""


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train(error) -> (exit code, standard error) of a training that raises it."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)

    def fail(error):
        def training(*_):
            raise error

        monkeypatch.setitem(sys.modules, "medpretrain.training.loop", SimpleNamespace(train=training))
        words = ["medpretrain", "train", str(tmp_path / "small.yaml"), f"run.dir={run}"]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "orig_argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    yield fail
    last_words.remember(None)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (WorkFailed("the loss is nan"), Exit.FAILED, "the loss is nan"),
        (KeyboardInterrupt(), Exit.FAILED, "interrupted from the keyboard"),
        (Preempted("SIGTERM: step 5 is committed"), Exit.PREEMPTED, "SIGTERM: step 5 is committed"),
        (NoProgress("3 restarts"), Exit.NO_PROGRESS, "3 restarts"),
        (ZeroDivisionError("by zero"), Exit.FAILED, "ZeroDivisionError: by zero"),
    ],
)
def test_the_last_line_and_the_exit_code_say_what_happened(train, tmp_path, error, code, words):
    found, errors = train(error)
    assert found == code
    last = errors.strip().splitlines()[-1]
    assert f", rank 0 of 1: {words}; resume: cd " in last
    assert last.endswith(f"medpretrain train {tmp_path}/small.yaml run.dir={tmp_path}/run")
    assert ("Traceback" in errors) == isinstance(error, ZeroDivisionError)
    (row,) = map(json.loads, (tmp_path / "run" / "failures.jsonl").read_text().splitlines())
    assert (row["cause"], row["code"], row["rank"]) == (words, code, 0)


def test_a_users_mistake_is_no_failure_of_the_run(train, tmp_path):
    code, errors = train(UserError("another process is training in it"))
    assert (code, errors) == (Exit.USER_ERROR, "error: another process is training in it\n")
    assert not (tmp_path / "run" / "failures.jsonl").exists()


def test_help_lists_the_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medpretrain", "train", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert all(f"{code.value}:" in shown for code in Exit)
