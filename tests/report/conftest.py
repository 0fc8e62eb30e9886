from __future__ import annotations

from pathlib import Path

import pytest

from medpretrain.report.write import report
from tests.report.example import write_example


@pytest.fixture(scope="session")
def example(tmp_path_factory) -> list[Path]:
    """RUN... of a report that shows everything."""
    return write_example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def made(example, tmp_path_factory) -> Path:
    """The report of it."""
    return report(example, tmp_path_factory.mktemp("made") / "report").parent
