from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_prep.errors import UserError
from medpretrain.export import bundle
from medpretrain.export.bundle import ExportReport, FeaturesDiffer, Provenance, export
from medpretrain.models.backbones import create_backbone

KINDS: dict[str, dict[str, Any]] = {
    "3x3 grey": {"architecture": "resnet18", "stem": "3x3", "channels": 1, "image_size": 32},
    "3x3 colour": {"architecture": "resnet18", "stem": "3x3", "channels": 3, "image_size": 32},
    "resnet": {"architecture": "resnet18", "stem": "timm", "channels": 3, "image_size": 64},
    "vit": {"architecture": "vit_tiny_patch16_224", "stem": "timm", "channels": 1, "image_size": 64},
}
PROVENANCE = Provenance(
    method="dino",
    recipe_name="configs/retina/dino_weak.yaml",
    recipe_sha256="1" * 64,
    dataset_sha256=("2" * 64, "3" * 64),
    dataset_counts={"train": 200, "test": 40},
    step=1000,
    images_seen=256_000,
    medpretrain_version="0.1.0",
    torch_version=torch.__version__,
)


def trained(architecture: str, stem: Any, channels: int, image_size: int) -> nn.Module:
    """A backbone whose weights and batch statistics are not those it starts with."""
    torch.manual_seed(2)
    backbone = create_backbone(architecture, channels=channels, stem=stem, image_size=image_size, drop_path=0.1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for _ in range(2):
            backbone(torch.randn(4, channels, image_size, image_size))
    return backbone


def exported(backbone: nn.Module, out: Path, kind: dict[str, Any], **changes: Any) -> ExportReport:
    channels = kind["channels"]
    statistics = {"mean": [0.21, 0.22, 0.23][:channels], "std": [0.31, 0.32, 0.33][:channels]}
    return export(
        backbone, **{**kind, **statistics, "name": "demo-v1", "provenance": PROVENANCE, "out": out, **changes}
    )


# Run by a Python that has timm and knows nothing of medpretrain, over all kinds: timm takes seconds to import.
FRESH_PROCESS = """
import json, os, sys, numpy, timm, torch
found = {}
for kind in json.loads(sys.argv[1]):
    given = numpy.load(f"{kind}.npz")
    x = torch.from_numpy(given["x"])
    preprocessing = json.load(open(f"{kind}/preprocessing.json"))
    if preprocessing["enlarge"]:
        x = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    model = timm.create_model(f"local-dir:{kind}", pretrained=True).eval()
    with torch.inference_mode():
        difference = (model(x) - torch.from_numpy(given["y"])).abs().max().item()
    resized = {"img_size": 96} if "vit" in kind else {}
    other = timm.create_model(f"local-dir:{kind}", pretrained=True, num_classes=5, in_chans=3, **resized).eval()
    with torch.inference_mode():
        shape = list(other(torch.zeros(2, 3, 96, 96)).shape)
    mine, theirs = model.state_dict(), other.state_dict()
    adapted = [key for key in mine if mine[key].shape != theirs[key].shape or not torch.equal(mine[key], theirs[key])]
    card = open(f"{kind}/README.md").read().split("```")[1].removeprefix("python\\n")
    variables = {}
    os.chdir(kind)
    exec(card, variables)
    os.chdir("..")
    by_card = (variables["features"].detach() - torch.from_numpy(given["of_image"])).abs().max().item()
    found[kind] = {"difference": difference, "shape": shape, "adapted": adapted, "by_card": by_card}
assert not any(module.startswith(("medpretrain", "data_prep")) for module in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def grey() -> nn.Module:
    return trained(**KINDS["3x3 grey"])


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, ExportReport], dict[str, dict[str, Any]]]:
    """An export of each kind, the reports, and what a fresh process found in them."""
    folder = tmp_path_factory.mktemp("bundles")
    reports = {}
    for kind, settings in KINDS.items():
        backbone = trained(**settings)
        channels, size = settings["channels"], settings["image_size"]
        reports[kind] = exported(backbone, folder / kind, settings)
        images = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(9))
        shape = (size, size, 3) if channels == 3 else (size, size)
        pixels = np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / kind / "image.png")
        mean, std = torch.tensor([0.21, 0.22, 0.23][:channels]), torch.tensor([0.31, 0.32, 0.33][:channels])
        image = (torch.from_numpy(pixels.astype(np.float32)).view(1, size, size, channels) / 255 - mean) / std
        with torch.inference_mode():
            y, of_image = backbone.eval()(images), backbone(image.permute(0, 3, 1, 2))
        np.savez(folder / f"{kind}.npz", x=images.numpy(), y=y.numpy(), of_image=of_image.numpy())
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, json.dumps(list(KINDS))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder, reports, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "allowed"), [("3x3 grey", 0.0), ("3x3 colour", 1e-5), ("resnet", 0.0), ("vit", 0.0)])
def test_plain_timm_in_a_fresh_process_computes_the_same_features(kind: str, allowed: float, bundles: Any) -> None:
    _, reports, found = bundles
    assert reports[kind].max_abs_difference <= allowed
    assert found[kind]["difference"] <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_other_channels_or_another_size_keep_the_rest(kind: str, bundles: Any) -> None:
    adapted = {
        "3x3 grey": ["conv1.weight"],
        "3x3 colour": [],
        "resnet": [],
        "vit": ["pos_embed", "patch_embed.proj.weight"],
    }
    found = bundles[2][kind]
    assert found["shape"] == [2, 5]
    assert found["adapted"] == adapted[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_the_card_give_the_features_of_an_image(kind: str, bundles: Any) -> None:
    assert bundles[2][kind]["by_card"] <= 1e-4


@pytest.mark.parametrize("kind", ["3x3 grey", "vit"])
def test_the_config_claims_this_run_and_nothing_of_imagenet(kind: str, bundles: Any) -> None:
    folder, reports, _ = bundles
    config = json.loads((folder / kind / "config.json").read_text())
    claimed = config["pretrained_cfg"]
    side = 64
    assert claimed["input_size"] == [1, side, side]
    assert (claimed["mean"], claimed["std"]) == ([0.21], [0.31])
    assert (claimed["crop_pct"], claimed["crop_mode"]) == (1.0, "squash")
    assert claimed["interpolation"] == ("nearest" if kind == "3x3 grey" else "bilinear")
    assert (claimed["tag"], claimed["license"], claimed["num_classes"]) == ("demo-v1", "other", 0)
    assert config["num_features"] == reports[kind].features
    assert ("repeat each pixel twice" in json.dumps(config)) == (kind == "3x3 grey")
    text = json.dumps(config).lower()
    for foreign in ("imagenet", "in1k", "in21k", "apache", "0.485", "0.229", "http", "hf_hub"):
        assert foreign not in text


def test_preprocessing_json_says_what_the_images_need(grey: nn.Module, tmp_path: Path) -> None:
    exported(grey, tmp_path / "out", KINDS["3x3 grey"], bit_depth=12)
    said = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert said["enlarge"] == {"factor": 2, "interpolation": "nearest"}
    assert (said["size"], said["resize"], said["channels"], said["bit_depth"]) == (32, "squash", 1, 12)
    assert (said["mean"], said["std"]) == ([0.21], [0.31])


def test_the_card_names_what_it_came_from_and_no_path(grey: nn.Module, tmp_path: Path) -> None:
    report = exported(grey, tmp_path / "out", KINDS["3x3 grey"])
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in ("library_name: timm", "license: other", '- "dino"', "1" * 64, "2" * 64, "256000", "dino_weak |"):
        assert expected in card
    assert "| images in the dataset | train 200, test 40 |" in card
    assert "| timm | not provided |" in card
    assert "must be enlarged twice" in card
    assert sorted(report.sha256) == ["README.md", "config.json", "model.safetensors", "preprocessing.json"]
    for file in report.sha256:
        content = (tmp_path / "out" / file).read_bytes()
        assert str(tmp_path).encode() not in content
        assert b"configs/" not in content
        assert b".partial" not in content


def test_what_exists_and_is_no_export_is_never_touched(grey: nn.Module, tmp_path: Path) -> None:
    folder, file, dangling = tmp_path / "data", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "preprocessing.json").write_text("not json")
    file.write_text("mine")
    dangling.symlink_to(tmp_path / "nowhere")
    for out in (folder, file, dangling):
        with pytest.raises(UserError, match="not an earlier export"):
            exported(grey, out, KINDS["3x3 grey"], overwrite=True)
    assert file.read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "file", "link"]


def test_an_earlier_export_is_replaced_only_when_said(grey: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(grey, out, KINDS["3x3 grey"])
    with pytest.raises(UserError, match="say overwrite"):
        exported(grey, out, KINDS["3x3 grey"], name="demo-v2")
    assert "# demo-v1" in (out / "README.md").read_text()
    exported(grey, out, KINDS["3x3 grey"], name="demo-v2", overwrite=True)
    assert "# demo-v2" in (out / "README.md").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_written_when_the_features_differ(
    earlier: bool, grey: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if earlier:
        exported(grey, out, KINDS["3x3 grey"])
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    def wrong(state: dict[str, torch.Tensor], stem: str) -> dict[str, torch.Tensor]:
        state = honest(state, stem)
        return {**state, "conv1.weight": state["conv1.weight"].roll(2, dims=3)}

    honest: Any = bundle.as_plain_timm_state
    monkeypatch.setattr(bundle, "as_plain_timm_state", wrong)
    with pytest.raises(FeaturesDiffer, match="differ by"):
        exported(grey, out, KINDS["3x3 grey"], overwrite=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_failed_rename_leaves_the_earlier_export(
    grey: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exported(grey, out, KINDS["3x3 grey"])
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="disk error"):
        exported(grey, out, KINDS["3x3 grey"], name="demo-v2", overwrite=True)
    assert "# demo-v1" in (out / "README.md").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet34"}, "not those of resnet34"),
        ({"stem": "timm"}, r"conv1.weight is \(64, 1, 3, 3\), not \(64, 1, 7, 7\)"),
        ({"architecture": "vit_tiny_patch16_224"}, "has no 3x3 stem"),
        ({"channels": 3, "mean": [0.2] * 3, "std": [0.2] * 3}, r"not \(64, 3, 3, 3\)"),
        ({"mean": [0.2, 0.3]}, "one value for each"),
        ({"name": "a/b"}, "must be of letters"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, grey: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        exported(grey, tmp_path / "out", KINDS["3x3 grey"], **changes)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = trained(**KINDS["3x3 grey"])
    with torch.no_grad():
        backbone.layer4[0].conv1.weight[0, 0, 0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match=r"layer4\.0\.conv1\.weight"):
        exported(backbone, tmp_path / "out", KINDS["3x3 grey"])


def test_the_backbone_is_left_as_it_was(tmp_path: Path) -> None:
    backbone = trained(**KINDS["3x3 grey"]).train().to(memory_format=torch.channels_last)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    exported(backbone, tmp_path / "out", KINDS["3x3 grey"])
    assert backbone.training
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())


def test_others_may_read_what_the_umask_allows(grey: nn.Module, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        exported(grey, tmp_path / "out", KINDS["3x3 grey"])
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


@pytest.mark.parametrize(
    "wrong", [{"recipe_sha256": "abc"}, {"step": -1}, {"method": "a/b"}, {"dataset_counts": {"/data": 1}}]
)
def test_provenance_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Provenance(**wrong)
