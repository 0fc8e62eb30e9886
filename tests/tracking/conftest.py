"""A run folder and a SQLite store; MLflow's variables of this process are as before after each test."""

from __future__ import annotations

import pytest

from medpretrain.tracking import session


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Senders fill in MLflow's variables for the process; undo that after each test."""
    for name in [*session.ENVIRONMENT, "MLFLOW_TRACKING_URI"]:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One SQLite store for a module's tests: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("seed: 1\n")
    return folder
