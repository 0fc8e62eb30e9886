from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.errors import UserError, WorkFailed
from medpretrain.export.registry import Registration, register_export
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import load_recipe
from medpretrain.tracking import session
from medpretrain.tracking.state import RunState
from tests.export.kinds import MEAN, PROVENANCE, STD
from tests.tracking.runs import free_port, stop_server

mlflow = pytest.importorskip("mlflow", reason="the train extra brings it")
FORMS: Any = ("timm", "onnx", "pt2")
STARTS_S = 240  # a server imports for seconds, on a busy machine for a minute


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's variables of this process are as before after each test."""
    for name in [*session.ENVIRONMENT, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "MLFLOW_TRACKING_URI"]:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("demo_dino", [])


def asked(name: str, uri: str, *aliases: str) -> Registration:
    found = Registration.check(name, aliases, FORMS, uri)
    assert found is not None
    return found


def register(registration: Registration, run: Path, recipe: Recipe, out: Path) -> str:
    run.mkdir(exist_ok=True)
    return register_export(registration, run, recipe, out, PROVENANCE, 512, again="medpretrain export RUN OUT")


def test_a_version_is_the_export_itself_with_its_hashes_and_belongs_to_the_run(
    store: str, recipe: Recipe, bundles: Any, tmp_path: Path
) -> None:
    out = bundles[0] / "resnet"
    said = register(asked("retina", store, "champion", "new"), tmp_path / "run", recipe, out)
    assert said == f"registered as models:/retina/1, models:/retina@champion, models:/retina@new at {store}"
    client = mlflow.MlflowClient(store, store)
    version = client.get_model_version_by_alias("retina", "champion")
    assert PROVENANCE.header().items() <= version.tags.items()
    owner = client.get_run(version.run_id)
    assert owner.data.tags[session.RUN_TAG] == RunState.of(tmp_path / "run").key
    folder = Path(client.download_artifacts(version.run_id, version.source.rpartition("/")[2], str(tmp_path)))
    for file in out.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    requirements = (folder / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in requirements) == ["mlflow", "numpy", "onnx", "onnxruntime"]

    # The same again is no new version, though the alias moves; another is, of the same run.
    assert "retina/1," in register(asked("retina", store, "other"), tmp_path / "run", recipe, out)
    assert client.get_model_version_by_alias("retina", "other").version == version.version
    other = shutil.copytree(out, tmp_path / "other")
    (other / "README.md").write_text("another card")
    register(asked("retina", store, "champion"), tmp_path / "run", recipe, other)
    second = client.get_model_version_by_alias("retina", "champion")
    assert (int(second.version), second.run_id) == (2, version.run_id)
    assert second.source != version.source


def test_a_served_version_answers_with_the_features_and_knows_nothing_of_medpretrain(
    store: str, recipe: Recipe, bundles: Any, backbones: Any, tmp_path: Path
) -> None:
    register(asked("served", store, "champion"), tmp_path / "run", recipe, bundles[0] / "resnet")
    for package in ("medpretrain", "data_prep"):
        (tmp_path / "poison" / package).mkdir(parents=True)
        (tmp_path / "poison" / package / "__init__.py").write_text("raise ImportError('not here')")
    port = free_port()
    environment = {**os.environ, **session.ENVIRONMENT, "MLFLOW_TRACKING_URI": store, "MLFLOW_REGISTRY_URI": store}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow calls uvicorn by its name
    log = tmp_path / "served.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion"),
                *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            ],
            env={**environment, "PYTHONPATH": str(tmp_path / "poison"), "PATH": path},
            cwd=tmp_path,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(server, port, log)
        images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(3))
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": {"pixels": images.tolist()}}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            served = np.array(json.load(answer)["predictions"]["features"], np.float32)
    finally:
        stop_server(server)
    with torch.inference_mode():
        features = backbones["resnet"]((images - MEAN[0]) / STD[0]).numpy()
    assert np.abs(served - features).max() <= 1e-5


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTS_S
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.5)


def test_a_registry_out_of_reach_leaves_the_export_and_says_how_to_go_on(
    recipe: Recipe, bundles: Any, tmp_path: Path
) -> None:
    out = shutil.copytree(bundles[0] / "resnet", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    uri = f"http://me:hunter2secret@127.0.0.1:{free_port()}"  # where nobody listens
    with pytest.raises(WorkFailed, match="is whole, but MLflow") as raised:
        register(asked("retina", uri, "champion"), tmp_path / "run", recipe, out)
    assert "again with: medpretrain export RUN OUT --register retina --alias champion" in str(raised.value)
    assert "hunter2secret" not in str(raised.value)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_run_tracked_with_a_password_is_not_registered_elsewhere_by_accident(bundles: Any, tmp_path: Path) -> None:
    recipe = load_recipe("demo_dino", ["tracking.uri=https://***@mlflow.example"])
    registration = Registration.check("retina", (), FORMS, None)
    assert registration is not None
    with pytest.raises(UserError, match="give --tracking-uri"):
        register(registration, tmp_path / "run", recipe, bundles[0] / "resnet")


@pytest.mark.parametrize(
    ("name", "aliases", "forms", "uri", "message"),
    [
        ("a/b", (), FORMS, None, "no slash"),
        (" ", (), FORMS, None, "no slash"),
        ("a", ("v3",), FORMS, None, "MLflow's"),
        ("a", ("latest",), FORMS, None, "MLflow's"),
        ("a", ("x y",), FORMS, None, "letters"),
        ("a", (), ("timm",), None, "form onnx"),
        ("a", (), FORMS, "none", "no server"),
        (None, ("champion",), FORMS, None, "for --register"),
        (None, (), FORMS, "sqlite:///x.db", "for --register"),
    ],
)
def test_what_mlflow_would_refuse_is_refused_before_any_work(
    name: str | None, aliases: tuple[str, ...], forms: Any, uri: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Registration.check(name, aliases, forms, uri)
