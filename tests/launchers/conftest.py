"""Jobs to be launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.job import Job


@pytest.fixture
def job():
    return Job("dino", "my recipe.yaml", ("views.global.crop=[0.5, 1]", "data.path=[a,b]"), Path("runs/dino"), 64)
