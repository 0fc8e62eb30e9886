"""Runs on the small dataset, none of which outlives its test."""

from __future__ import annotations

import pytest

from tests.faults.running import Runs, write_recipe


@pytest.fixture
def runs(tmp_path, small_dataset):
    """runs.ranks(...) and runs.torchrun(...) start 30 steps of training."""
    started = Runs(write_recipe(tmp_path, small_dataset, steps=30), tmp_path)
    yield started
    started.close()
