"""A few of the kills of benchmarks/crashes.py."""

from __future__ import annotations

import random

import crashes
import pytest


@pytest.mark.distributed
def test_a_run_killed_inside_a_save_and_elsewhere_comes_to_the_same_end_by_itself(tmp_path, monkeypatch):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    monkeypatch.setattr(crashes, "STEPS", 16)
    rows = crashes.campaign(tmp_path, 3, seed, crashes.HOW[:1], lambda rows: None)
    kills = [kill for row in rows for kill in row["kills"]]
    assert len(kills) == 3
    assert not [fault for kill in kills for fault in crashes.faults(kill)]
    assert all(row["ok"] for row in rows), [row["difference"] for row in rows]
