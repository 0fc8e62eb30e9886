import io
import math

import pytest
from rich.console import Console

from medpretrain.training.display import Display

ROW = {"step": 250, "loss": 5.43219, "images_per_s": 812.6, "data_wait": 0.0312, "feature_std": 0.0301, "rankme": 17.42}


def shown(rows, terminal, width=100, alarms=None, **arguments):
    file = io.StringIO()
    ticks = iter(range(0, 10_000_000, 100))
    console = Console(force_terminal=terminal, file=file, width=width, height=30, _environ={"TERM": "xterm"})
    with Display(1000, console=console, clock=lambda: float(next(ticks)), **arguments) as display:
        for row in rows:
            display.update(row, (alarms or {}).get(row["step"], ""))
    return file.getvalue()


def test_a_log_gets_one_plain_line_a_row():
    lines = shown([ROW, ROW | {"step": 500, "loss": 4.0}], terminal=False, width=30).splitlines()
    assert lines == [
        "step 250/1000  loss 5.432  813 images/s  data wait 3.1 %  feature std 0.0301  RankMe 17.4  5m 00s left",
        "step 500/1000  loss 4  813 images/s  data wait 3.1 %  feature std 0.0301  RankMe 17.4  3m 20s left",
    ]


def test_a_terminal_gets_a_bar_and_the_same_facts():
    text = shown([ROW], terminal=True)
    assert "step 250/1000" in text
    assert "━" in text
    assert "loss 5.432  813 images/s  data wait 3.1 %  feature std 0.0301  RankMe 17.4  5m 00s left" in text
    assert "COLLAPSE" not in text


def test_a_dumb_terminal_gets_plain_lines():
    file = io.StringIO()
    console = Console(force_terminal=True, file=file, _environ={"TERM": "dumb"})
    with Display(10, console=console) as display:
        display.update({"step": 1})
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_an_alarm_is_shown_with_its_row(terminal):
    text = shown([ROW, ROW | {"step": 500}], terminal, alarms={500: "COLLAPSE: RankMe is 1.8"})
    assert text.count("COLLAPSE: RankMe is 1.8") == 1
    assert text.index("step 500/1000") < text.index("COLLAPSE")


def test_an_alarm_is_gone_from_the_terminal_with_the_next_row():
    text = shown([ROW, ROW | {"step": 500}], terminal=True, alarms={250: "COLLAPSE: RankMe is 1.8"})
    assert "step 500/1000" in text
    assert "COLLAPSE" not in text[text.index("step 500/1000") :]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_row_with_nothing_but_a_step_is_shown(terminal):
    assert "step 0/1000" in shown([{"step": 0}], terminal)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps():
    assert "12m 30s left" in shown([ROW | {"step": 250}], terminal=False, start_step=150)


def test_a_nan_loss_is_shown():
    assert "loss nan" in shown([ROW | {"loss": math.nan}], terminal=False)
