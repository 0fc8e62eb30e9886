"""What a log shows of a run that goes on for hours: rate, time left, bytes and what was set aside; no name."""

from __future__ import annotations

import itertools

import pytest

from data_prep import progress
from data_prep.options import Progress


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.progress() as report:
        for done in range(0, 60_000, 2_000):
            report(Progress("sources", done, None))
        for done in range(0, 1_000_000, 40_000):
            report(Progress("images", done, 1_000_000, bytes=done * 50_000, quarantined=done // 1000))
    lines = capsys.readouterr().err.splitlines()
    assert 12 <= len(lines) <= 20  # 55 reports, 20 seconds apart
    assert lines[0].startswith("sources: ")
    assert "100/s" in lines[0]
    assert "left" not in lines[0]  # nobody knows how many there are
    assert lines[-1].startswith("images: ")
    assert " of 1,000,000, " in lines[-1]
    assert "min left" in lines[-1]
    assert "GB" in lines[-1]
    assert "quarantined" in lines[-1]
