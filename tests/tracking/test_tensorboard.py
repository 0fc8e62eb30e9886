"""TensorBoard shows each step of a run once, whatever was resumed, rolled back or killed."""

import importlib.util
import json

import pytest

from data_prep.errors import UserError
from medpretrain.recipe_file import load_recipe
from medpretrain.tracking.metrics_log import MetricsLog
from medpretrain.tracking.of_run import check_tracking
from medpretrain.tracking.tensorboard import TensorBoardWriter
from tests.tracking.runs import expected, wait_for, write


def shown(run, key="loss"):
    """What TensorBoard shows: its own reader, with the purges it makes."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, pytest.approx(event.value)) for event in reader.Scalars(key)]


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("tensorboard", reason="the tensorboard extra brings it")


def written_to(run):
    file = run / "tensorboard" / "position.json"
    return json.loads(file.read_text())["step"] if file.exists() else -1


def test_rows_are_shown_once_over_a_resume_a_rollback_and_an_unwritten_position(run):
    write(run, range(6))
    TensorBoardWriter(run, interval_s=0.02).close(60)
    assert shown(run) == expected(range(6))

    position = (run / "tensorboard" / "position.json").read_text()
    with MetricsLog(run / "metrics.jsonl") as log:
        log.truncate_after(3)
    write(run, range(4, 9))
    TensorBoardWriter(run, interval_s=0.02).close(60)
    assert shown(run) == expected(range(9))

    (run / "tensorboard" / "position.json").write_text(position)  # killed after the events, before the position
    TensorBoardWriter(run, interval_s=0.02).close(60)
    assert shown(run) == expected(range(9))


def test_a_rollback_while_it_is_followed_purges_the_abandoned_steps(run):
    write(run, range(8))
    writer = TensorBoardWriter(run, interval_s=0.02)
    wait_for(lambda: written_to(run) == 7)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.truncate_after(3)
        log.append({"step": 5, "loss": 1 / 6})  # logged less often than before: nothing at 4, 6 and 7
        log.append({"step": 9, "loss": 1 / 10})
    writer.close(60)
    assert shown(run) == expected([0, 1, 2, 3, 5, 9])


def test_without_the_package_the_extra_is_named_before_training(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    check_tracking(load_recipe("simclr"))
    with pytest.raises(UserError, match="extra `tensorboard`"):
        check_tracking(load_recipe("simclr", ["tracking.tensorboard=true"]))
