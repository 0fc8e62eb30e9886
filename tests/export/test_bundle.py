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
from torch import nn

from data_prep.errors import UserError, WorkFailed
from medpretrain.export import graph_forms, timm_form
from medpretrain.export.bundle import FeaturesDiffer, parse_forms
from medpretrain.export.provenance import Provenance
from tests.export.kinds import KINDS, PROVENANCE, exported, trained

# Run by a Python that has timm and knows nothing of medpretrain, over all kinds: timm takes seconds to import.
FRESH_PROCESS = """
import json, sys, numpy, safetensors, timm, torch
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
    with safetensors.safe_open(f"{kind}/model.safetensors", "pt") as file:
        header = file.metadata()
    found[kind] = {"difference": difference, "shape": shape, "adapted": adapted, "header": header}
assert not any(module.startswith(("medpretrain", "data_prep")) for module in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def grey() -> nn.Module:
    return trained(**KINDS["3x3 grey"])


GREY = {**KINDS["3x3 grey"], "forms": ("timm",)}


@pytest.fixture(scope="module")
def fresh(
    tmp_path_factory: pytest.TempPathFactory,
    bundles: Any,
    backbones: dict[str, nn.Module],
) -> dict[str, dict[str, Any]]:
    """What a fresh process found in each export."""
    folder = tmp_path_factory.mktemp("fresh")
    for kind, settings in KINDS.items():
        channels, size = settings["channels"], settings["image_size"]
        images = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(9))
        with torch.inference_mode():
            np.savez(folder / f"{kind}.npz", x=images.numpy(), y=backbones[kind](images).numpy())
        (folder / kind).symlink_to(bundles[0] / kind)
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, json.dumps(list(KINDS))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "allowed"), [("3x3 grey", 0.0), ("3x3 colour", 1e-5), ("resnet", 0.0), ("vit", 0.0)])
def test_plain_timm_in_a_fresh_process_computes_the_same_features(
    kind: str, allowed: float, bundles: Any, fresh: Any
) -> None:
    assert bundles[1][kind].differences["timm"].absolute <= allowed
    assert fresh[kind]["difference"] <= allowed


@pytest.mark.parametrize("kind", [kind for kind, settings in KINDS.items() if "forms" in settings])
def test_onnx_and_torch_export_are_within_1e_5_and_timm_is_equal(kind: str, bundles: Any) -> None:
    found = bundles[1][kind].differences
    print(kind, {form: (one.absolute, one.relative) for form, one in found.items()})
    assert list(found) == ["timm", "onnx", "pt2"]
    assert found["timm"].absolute == 0
    assert found["onnx"].absolute <= 1e-5
    assert found["pt2"].absolute <= 1e-5
    assert all(one.largest > 0.1 for one in found.values()), "features of nothing would be equal too"


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_other_channels_or_another_size_keep_the_rest(kind: str, fresh: Any) -> None:
    adapted = {
        "3x3 grey": ["conv1.weight"],
        "3x3 colour": [],
        "resnet": ["conv1.0.weight"],
        "vit": ["pos_embed", "patch_embed.proj.weight"],
    }
    assert fresh[kind]["shape"] == [2, 5]
    assert fresh[kind]["adapted"] == adapted[kind]


def test_the_header_of_the_weights_says_where_they_came_from(fresh: Any, bundles: Any) -> None:
    header = fresh["resnet"]["header"]
    assert PROVENANCE.header().items() <= header.items()
    assert header["checkpoint_sha256"] == "4" * 64
    said, written = json.loads(header["preprocessing"]), _preprocessing(bundles[0] / "resnet")
    assert said == {key: value for key, value in written.items() if key != "weights_sha256"}
    assert (header["format"], header["export"]) == ("pt", "medpretrain export 2")


def test_the_graphs_carry_the_same_header(bundles: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundles[0] / "resnet" / "model.onnx"))
    assert PROVENANCE.header().items() <= session.get_modelmeta().custom_metadata_map.items()
    assert session.get_inputs()[0].shape == ["batch", 1, 32, 32]
    extra = {"metadata.json": ""}
    torch.export.load(bundles[0] / "resnet" / "model.pt2", extra_files=extra)
    assert PROVENANCE.header().items() <= json.loads(extra["metadata.json"]).items()


def test_no_file_names_a_folder_of_this_machine(bundles: Any) -> None:
    """The tracer and the exporter keep the stack of every operation unless it is taken out."""
    here = [sys.prefix, str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), "site-packages", ".partial"]
    files = [file for kind in KINDS for file in (bundles[0] / kind).iterdir() if file.is_file()]
    assert sum(file.suffix in (".onnx", ".pt2") for file in files) == 6
    for file in files:
        content = file.read_bytes()
        for folder in here:
            assert folder.encode() not in content, (file, folder)


def test_the_same_export_has_the_same_bytes(grey: nn.Module, tmp_path: Path) -> None:
    first, second = (exported(grey, tmp_path / name, GREY).sha256 for name in ("a", "b"))
    assert first == second


def _preprocessing(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "preprocessing.json").read_text())


@pytest.mark.parametrize("kind", ["3x3 grey", "vit"])
def test_the_config_claims_this_run_and_nothing_of_imagenet(kind: str, bundles: Any) -> None:
    folder, reports = bundles
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
    exported(grey, tmp_path / "out", GREY, bit_depth=12)
    said = _preprocessing(tmp_path / "out")
    assert said["enlarge"] == {"factor": 2, "interpolation": "nearest"}
    assert (said["size"], said["resize"], said["channels"], said["bit_depth"]) == (32, "squash", 1, 12)
    assert (said["mean"], said["std"], said["divide"]) == ([0.21], [0.31], 4095)
    assert (said["edges"], said["rounded"], said["window"]) == ("replicate", False, None)
    assert said["forms"] == {"timm": {"file": "model.safetensors", "takes": "normalised", "size": 64}}


def test_the_card_names_what_it_came_from_and_no_path(grey: nn.Module, tmp_path: Path) -> None:
    report = exported(grey, tmp_path / "out", GREY)
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "library_name: timm",
        "license: other",
        '- "dino"',
        "1" * 64,
        "2" * 64,
        "4" * 64,
        "256000",
        "dino_weak |",
    ):
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
            exported(grey, out, GREY, overwrite=True)
    assert file.read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "file", "link"]


def test_an_earlier_export_is_replaced_only_when_said(grey: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(grey, out, GREY)
    with pytest.raises(UserError, match="say --overwrite"):
        exported(grey, out, GREY, name="demo-v2")
    assert "# demo-v1" in (out / "README.md").read_text()
    exported(grey, out, GREY, name="demo-v2", overwrite=True)
    assert "# demo-v2" in (out / "README.md").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_written_when_the_features_differ(
    earlier: bool, grey: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if earlier:
        exported(grey, out, GREY)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    def wrong(state: dict[str, torch.Tensor], stem: str) -> dict[str, torch.Tensor]:
        state = honest(state, stem)
        return {**state, "conv1.weight": state["conv1.weight"].roll(2, dims=3)}

    honest: Any = timm_form.as_plain_timm_state
    monkeypatch.setattr(timm_form, "as_plain_timm_state", wrong)
    with pytest.raises(FeaturesDiffer, match="differ by"):
        exported(grey, out, GREY, overwrite=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_graph_that_differs_or_cannot_be_made_leaves_nothing(
    form: str, backbones: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Any = getattr(graph_forms, f"load_{form}")
    monkeypatch.setattr(graph_forms, f"load_{form}", lambda file: lambda pixels: honest(file)(pixels) + 2e-5)
    kind = {**KINDS["resnet"], "forms": parse_forms(form)}
    with pytest.raises(FeaturesDiffer, match=f"{form}: the features of the export differ by 2"):
        exported(backbones["resnet"], tmp_path / "out", kind)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx if form == "onnx" else torch.export, "export", broken)
    with pytest.raises(WorkFailed, match=r"\(RuntimeError: no such operator\); --forms"):
        exported(backbones["resnet"], tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_form_is_refused_and_timm_is_always_there() -> None:
    assert parse_forms("pt2") == ("timm", "pt2")
    with pytest.raises(UserError, match="no form 'onxx'; did you mean 'onnx'"):
        parse_forms("timm,onxx")


def test_a_failed_rename_leaves_the_earlier_export(
    grey: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exported(grey, out, GREY)
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="disk error"):
        exported(grey, out, GREY, name="demo-v2", overwrite=True)
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
        exported(grey, tmp_path / "out", GREY, **changes)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = trained(**GREY)
    with torch.no_grad():
        backbone.layer4[0].conv1.weight[0, 0, 0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match=r"layer4\.0\.conv1\.weight"):
        exported(backbone, tmp_path / "out", GREY)


def test_the_backbone_is_left_as_it_was(tmp_path: Path) -> None:
    backbone = trained(**GREY).train().to(memory_format=torch.channels_last)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    exported(backbone, tmp_path / "out", GREY)
    assert backbone.training
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())


def test_others_may_read_what_the_umask_allows(grey: nn.Module, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        exported(grey, tmp_path / "out", GREY)
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
