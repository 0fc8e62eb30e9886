"""An export as a version of a model in MLflow's registry, served by MLflow without medpretrain.

The version's folder is the export itself, every file as the card's hashes say, with MLflow's own few beside it: its
`onnx` flavour answers for `model.onnx`, and timm loads the same folder as `local-dir:`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_prep.dataset import file_sha256
from data_prep.errors import UserError, WorkFailed
from medpretrain.export.description import FILES, INPUT, OUTPUT, WEIGHTS, Form, read_description
from medpretrain.export.provenance import Provenance
from medpretrain.recipe import Recipe
from medpretrain.tracking.redaction import redact
from medpretrain.tracking.session import RUN_TAG, artifact_location, brief, default_uri, failures
from medpretrain.tracking.state import RunState

_SERVED_WITH = ("mlflow", "numpy", "onnx", "onnxruntime")
_TAG = "export_sha256"
"""Of a version: SHA-256 of the names and hashes of the export's files. A version of the same is not made twice, and
two exports of one run never share a folder."""


@dataclass(frozen=True)
class Registration:
    """What was asked for, checked before any work is done."""

    name: str
    aliases: tuple[str, ...]
    uri: str | None

    @classmethod
    def check(cls, name: str | None, aliases: Sequence[str], forms: Sequence[Form], uri: str | None) -> Self | None:
        """Raises:
        UserError: a name or an alias that MLflow refuses, or one without the other; no ONNX to serve; no MLflow.
        """
        if name is None:
            if aliases or uri:
                raise UserError("--alias and --tracking-uri are for --register NAME")
            return None
        if not name.strip() or re.search(r"[/:\x00-\x1f]", name):
            raise UserError(f"--register {name!r}: a model's name has no slash and no colon")
        for alias in aliases:
            if not re.fullmatch(r"[\w-]+", alias) or alias == "latest" or re.fullmatch(r"[vV]\d+", alias):
                raise UserError(
                    f"--alias {alias!r}: letters, digits, dashes and underscores; `latest` and v1, v2, ... are MLflow's"
                )
        if "onnx" not in forms:
            raise UserError("--register needs the form onnx, which is what MLflow serves")
        if uri == "none":
            raise UserError("--tracking-uri none is no server")
        try:
            failures()
        except ImportError as error:
            raise UserError(f"--register needs MLflow, which the train extra brings ({error})") from None
        return cls(name, tuple(aliases), uri)

    def words(self) -> str:
        """The options that ask for it again; passwords are left out."""
        words = ["--register", self.name]
        for alias in self.aliases:
            words += ["--alias", alias]
        return shlex.join(words + (["--tracking-uri", redact(self.uri)] if self.uri else []))


def register_export(
    asked: Registration, run: Path, recipe: Recipe, out: Path, provenance: Provenance, features: int, *, again: str
) -> str:
    """Register an export; what is registered already is not sent a second time.

    Args:
        asked: name, aliases and where.
        run: the run's folder; the version belongs to its MLflow run, which is made where the server has none.
        recipe: for the experiment, and the tracking URI where none was asked for.
        out: the export.
        provenance: becomes tags.
        features: D.
        again: the command that exports the same again, for the message.

    Returns:
        What was done, for people.

    Raises:
        UserError: the run's tracking URI had a password, which is not kept.
        WorkFailed: MLflow cannot be reached or refuses; the export stays as it is.
    """
    uri = _uri(asked, run, recipe)
    expected = failures()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    tags = {**provenance.header(), "weights_sha256": file_sha256(out / WEIGHTS), _TAG: _sha256(out)}
    try:
        version = _Registry(uri).version(asked, run, recipe, out, tags, features)
    except expected as error:
        raise WorkFailed(
            f"{out} is whole, but MLflow at {redact(uri)} did not register it ({brief(error, uri)}); again with: "
            f"{again} {asked.words()}"
        ) from None
    names = "".join(f", models:/{asked.name}@{alias}" for alias in asked.aliases)
    return f"registered as models:/{asked.name}/{version}{names} at {redact(uri)}"


class _Registry:
    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self._uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def version(
        self, asked: Registration, run: Path, recipe: Recipe, out: Path, tags: dict[str, str], features: int
    ) -> str:
        self._ensure_model(asked.name)
        version = self._known(asked.name, tags[_TAG])
        if version is None:
            owner = self._run(run, recipe)
            place = f"export-{tags[_TAG][:12]}"
            with tempfile.TemporaryDirectory() as folder:
                model = Path(folder) / "model"
                write_mlflow_model(out, model, features)
                self._client.log_artifacts(owner.info.run_id, str(model), place)
            source = f"{owner.info.artifact_uri}/{place}"
            made = self._client.create_model_version(asked.name, source, run_id=owner.info.run_id, tags=tags)
            version = str(made.version)
        for alias in asked.aliases:
            self._client.set_registered_model_alias(asked.name, alias, version)
        return version

    def _ensure_model(self, name: str) -> None:
        from mlflow import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _known(self, name: str, sha256: str) -> str | None:
        for found in self._client.search_model_versions(f"name = '{name}'"):
            if found.tags.get(_TAG) == sha256 and found.status == "READY":
                return str(found.version)
        return None

    def _run(self, run: Path, recipe: Recipe) -> Any:
        """The run's own on this server, or a new one that a later `sync` finds and fills."""
        experiment = recipe.tracking.experiment
        found = self._client.get_experiment_by_name(experiment)
        number = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(experiment, artifact_location=artifact_location(self._uri))
        )
        key = RunState.of(run).key
        runs = self._client.search_runs([number], f"tags.`{RUN_TAG}` = '{key}'", max_results=1)
        if runs:
            return runs[0]
        made = self._client.create_run(number, run_name=recipe.name, tags={RUN_TAG: key})
        self._client.set_terminated(made.info.run_id)
        return made


def write_mlflow_model(out: Path, model: Path, features: int) -> None:
    """The folder of an export as an MLflow model.

    Args:
        out: the export.
        model: is made.
        features: D.
    """
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    description = read_description(out)
    n, single = description, np.dtype(np.float32)
    images = TensorSpec(single, (-1, n.channels, n.size, n.size), INPUT)
    mlflow.onnx.save_model(
        onnx.load(out / FILES["onnx"], load_external_data=False),
        str(model),
        signature=ModelSignature(Schema([images]), Schema([TensorSpec(single, (-1, features), OUTPUT)])),
        pip_requirements=[
            f"{package}=={importlib.metadata.version(package)}"
            for package in ("mlflow", "onnx", "onnxruntime", "numpy")
        ],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    # MLflow has written its own copy of the graph; the export's own files, byte for byte, take its place.
    shutil.copytree(out, model, dirs_exist_ok=True)


def _sha256(out: Path) -> str:
    files = {file.name: file_sha256(file) for file in out.iterdir()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _uri(asked: Registration, run: Path, recipe: Recipe) -> str:
    ours = recipe.tracking.uri
    if asked.uri is None and ours is not None and "***" in ours:
        raise UserError(f"{run} was tracked at {ours} and passwords are not kept: give --tracking-uri")
    uri = default_uri(run, asked.uri or (None if ours == "none" else ours))
    if uri == "none":
        raise UserError("MLFLOW_TRACKING_URI is none, which is no server: give --tracking-uri")
    return uri
