from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.dataset import file_sha256
from data_prep.errors import UserError
from medpretrain.export.description import read_preprocessing
from medpretrain.export.reading import read_bundle
from medpretrain.models.preprocessing import Preprocessing
from tests.export.kinds import KINDS, MEAN, PROVENANCE, STD


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_computes_what_was_trained_on_images_that_are_not_enlarged(
    kind: str, bundles: Any, backbones: Any
) -> None:
    found = read_bundle(bundles[0] / kind)
    channels, size = KINDS[kind]["channels"], KINDS[kind]["image_size"]
    images = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        assert torch.equal(found.backbone(images), backbones[kind](images))
    depth = KINDS[kind].get("bit_depth", 8)
    assert found.preprocessing == Preprocessing(size, channels, tuple(MEAN[:channels]), tuple(STD[:channels]), depth)
    assert (found.architecture, found.stem, found.name) == (KINDS[kind]["architecture"], KINDS[kind]["stem"], "demo-v1")
    assert found.provenance == PROVENANCE.header()


def test_an_export_of_the_first_version_is_still_read(bundles: Any, backbones: Any, tmp_path: Path) -> None:
    out = shutil.copytree(bundles[0] / "3x3 grey", tmp_path / "out")
    first = {"format": "medpretrain export", "version": 1, "size": 32, "resize": "squash", "interpolation": "bilinear"}
    first |= {"antialias": True, "channels": 1, "bit_depth": 8, "mean": [0.21], "std": [0.31]}
    first |= {"enlarge": {"factor": 2, "interpolation": "nearest"}}
    (out / "preprocessing.json").write_text(json.dumps(first))
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors")  # it had no metadata
    found = read_bundle(out)
    assert found.provenance == {}
    assert found.stem == "3x3"
    assert torch.equal(found.backbone.state_dict()["conv1.weight"], backbones["3x3 grey"].state_dict()["conv1.weight"])


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        content = json.loads((out / "preprocessing.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (out / "preprocessing.json").write_text(json.dumps(content))

    return edit


def reweighted(change: Callable[[dict[str, torch.Tensor]], None], *, announced: bool = True) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        state = load_file(out / "model.safetensors")
        change(state)
        save_file(state, out / "model.safetensors")
        if announced:
            edited(weights_sha256=file_sha256(out / "model.safetensors"))(out)

    return edit


def poison(state: dict[str, torch.Tensor]) -> None:
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan


def train_on(state: dict[str, torch.Tensor]) -> None:
    state["conv1.weight"] += 0.01


def lose(state: dict[str, torch.Tensor]) -> None:
    del state["bn1.bias"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (edited(version=3), r"exported by a newer medpretrain: it has version 3 .* reads up to 2; install"),
    "newer, of other fields": (edited(version=3, size=..., more=1), "exported by a newer medpretrain"),
    "another format": (edited(format="theirs"), "is no export"),
    "no JSON": (lambda out: (out / "preprocessing.json").write_text("{"), "damaged: it is not JSON"),
    "no preprocessing": (lambda out: (out / "preprocessing.json").unlink(), "cannot be read: No such file"),
    "a field lost": (edited(mean=...), "was changed: mean: Field required"),
    "two means": (edited(mean=[0.1, 0.2]), "one value for each"),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "is missing"),
    "other weights": (reweighted(train_on, announced=False), "not the file that was exported"),
    "trained further": (reweighted(train_on), "trained further after the export"),
    "not finite": (reweighted(poison), r"not finite: layer1\.0\.conv1\.weight"),
    "a tensor lost": (reweighted(lose), "bn1.bias is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_whole_export_is_refused_in_one_line(damage: str, bundles: Any, tmp_path: Path) -> None:
    out = shutil.copytree(bundles[0] / "3x3 grey", tmp_path / "out", ignore=shutil.ignore_patterns("*.onnx", "*.pt2"))
    change, message = DAMAGE[damage]
    change(out)
    with pytest.raises(UserError) as raised:
        read_bundle(out)
    assert re.search(message, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)


def test_preprocessing_alone_is_refused_of_a_newer_version_too(bundles: Any, tmp_path: Path) -> None:
    shutil.copy(bundles[0] / "vit" / "preprocessing.json", tmp_path)
    assert read_preprocessing(tmp_path).size == 64
    edited(version=3)(tmp_path)
    with pytest.raises(UserError, match="newer medpretrain"):
        read_preprocessing(tmp_path)
