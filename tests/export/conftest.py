"""One export of each kind for all tests of the room: the ONNX exporter takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from medpretrain.export.bundle import ExportReport
from tests.export.kinds import KINDS, exported, trained


@pytest.fixture(scope="session")
def backbones() -> dict[str, nn.Module]:
    return {kind: trained(**settings).eval() for kind, settings in KINDS.items()}


@pytest.fixture(scope="session")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, nn.Module]
) -> tuple[Path, dict[str, ExportReport]]:
    """A folder with an export of each kind by its name, to be left as it is, and the reports."""
    folder = tmp_path_factory.mktemp("bundles")
    return folder, {kind: exported(backbones[kind], folder / kind, settings) for kind, settings in KINDS.items()}
