import io
import math

import pytest
from rich.console import Console

from medpretrain.training.display import Display

ROW = {"step": 250, "loss": 5.43219, "images_per_s": 812.6, "data_wait": 0.0312, "feature_std": 0.0301}


def shown(rows, terminal, width=100, **arguments):
    file = io.StringIO()
    ticks = iter(range(0, 10_000_000, 100))
    console = Console(force_terminal=terminal, file=file, width=width, height=30, _environ={"TERM": "xterm"})
    with Display(1000, console=console, clock=lambda: float(next(ticks)), **arguments) as display:
        for row in rows:
            display.update(row)
    return file.getvalue()


def test_a_log_gets_one_plain_line_a_row():
    lines = shown([ROW, ROW | {"step": 500, "loss": 4.0}], terminal=False, width=30).splitlines()
    assert lines == [
        "step 250/1000  loss 5.432  813 images/s  data wait 3.1 %  feature std 0.0301  5m 00s left",
        "step 500/1000  loss 4  813 images/s  data wait 3.1 %  feature std 0.0301  3m 20s left",
    ]


def test_a_terminal_gets_a_bar_and_the_same_facts():
    text = shown([ROW], terminal=True)
    assert "step 250/1000" in text
    assert "━" in text
    assert "loss 5.432  813 images/s  data wait 3.1 %  feature std 0.0301  5m 00s left" in text
    assert "COLLAPSE" not in text


def test_a_dumb_terminal_gets_plain_lines():
    file = io.StringIO()
    console = Console(force_terminal=True, file=file, _environ={"TERM": "dumb"})
    with Display(10, console=console) as display:
        display.update({"step": 1})
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("std", [0.0009, 0.0, math.nan])
def test_a_collapse_is_plain_to_see(terminal, std):
    text = shown([ROW | {"feature_std": std}], terminal, collapse_below=0.001)
    assert f"COLLAPSE: feature std {std:.3g} (alarm below 0.001)" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_no_alarm_at_the_threshold_or_without_one(terminal):
    assert "COLLAPSE" not in shown([ROW | {"feature_std": 0.001}], terminal, collapse_below=0.001)
    assert "COLLAPSE" not in shown([ROW | {"feature_std": 0.0}], terminal)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_row_with_nothing_but_a_step_is_shown(terminal):
    assert "step 0/1000" in shown([{"step": 0}], terminal)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps():
    assert "12m 30s left" in shown([ROW | {"step": 250}], terminal=False, start_step=150)


def test_a_nan_loss_is_shown():
    assert "loss nan" in shown([ROW | {"loss": math.nan}], terminal=False)
