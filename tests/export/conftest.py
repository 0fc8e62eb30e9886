"""One export of each kind for all tests of the room, made when it is first asked for: ONNX's exporter takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from medpretrain.export.bundle import ExportReport
from tests.export.kinds import KINDS, exported, trained


@pytest.fixture(scope="session")
def backbones() -> dict[str, nn.Module]:
    return {kind: trained(**settings).eval() for kind, settings in KINDS.items()}


class Reports(dict[str, ExportReport]):
    def __init__(self, folder: Path, backbones: dict[str, nn.Module]) -> None:
        super().__init__()
        self._folder, self._backbones = folder, backbones

    def __missing__(self, kind: str) -> ExportReport:
        self[kind] = exported(self._backbones[kind], self._folder / kind, KINDS[kind])
        return self[kind]


class Folder:
    def __init__(self, path: Path, reports: Reports) -> None:
        self._path, self._reports = path, reports

    def __truediv__(self, name: str) -> Path:
        if name in KINDS:
            _ = self._reports[name]
        return self._path / name


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, nn.Module]) -> tuple[Folder, Reports]:
    """A folder with an export of each kind by its name, to be left as it is, and the reports."""
    path = tmp_path_factory.mktemp("bundles")
    reports = Reports(path, backbones)
    return Folder(path, reports), reports
