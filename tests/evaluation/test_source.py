"""What a user names is what is evaluated: that network with that preprocessing, and a hash that says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_prep.dataset import Dataset, file_sha256
from data_prep.errors import UserError
from data_prep.images import prepare
from medpretrain.evaluation import source as module
from medpretrain.evaluation.source import Source, conversion, open_source
from medpretrain.export.of_run import export_run
from medpretrain.models.preprocessing import Preprocessing
from medpretrain.recipe_file import load_recipe
from medpretrain.training import loop
from medpretrain.training.build import load_run

RECIPE = """\
name: tiny
seed: 5
data: {{path: {small}, channels: 1, labels: [modality, anatomy], threads: 1}}
backbone: {{name: resnet18, stem: 3x3}}
views: {{crop: {{size: 32, count: 2, crop: [0.3, 1]}}}}
method: {{name: modan_mulsupcon}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 2, global_batch: 8, log_every: 1, threads: 1}}
checkpoint: {{every: 1}}
device: cpu
tracking: {{uri: none}}
"""
IMAGES = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def of(source: Source, images: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return source.backbone(images)


@pytest.fixture(scope="module")
def gray(small_dataset: Path) -> Dataset:
    return Dataset.open(small_dataset)


@pytest.fixture(scope="module")
def run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "tiny.yaml").write_text(RECIPE.format(small=small_dataset))
    done = loop.train(load_recipe(str(folder / "tiny.yaml"), [f"run.dir={folder / 'tiny_run'}"]), "auto")
    return Path(done.run)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_run(run, out)
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """An export to be damaged."""
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def say(folder: Path, **changes: Any) -> None:
    said = json.loads((folder / "preprocessing.json").read_text())
    (folder / "preprocessing.json").write_text(json.dumps(said | changes))


def test_a_run_is_its_newest_checkpoint_and_says_where_it_comes_from(run: Path, gray: Dataset) -> None:
    source, trained = open_source(str(run), dataset=gray), load_run(run)
    assert torch.equal(of(source), trained.backbone(IMAGES))
    assert source.preprocessing == trained.preprocessing
    assert not source.backbone.training
    record = source.record()
    assert (record.name, record.kind, record.architecture) == ("tiny_run", "run", "resnet18")
    expected = {
        "method": "modan_mulsupcon",
        "recipe": "tiny",
        "recipe_sha256": trained.recipe.sha256,
        "step": 2,
        "seed": 5,
        "setting_sha256": trained.recipe.model_copy(update={"seed": 0}).sha256,
        "images_seen": 16,
        "dataset_sha256": gray.sha256,
        "stem": "3x3",
    }
    assert record.about == expected


def test_a_checkpoint_is_that_step_under_a_name_of_its_own(run: Path, gray: Dataset) -> None:
    newest = open_source(str(run), dataset=gray)
    first, last = (open_source(str(run / "checkpoints" / f"step-0000000{step}"), dataset=gray) for step in (1, 2))
    assert (first.name, first.about["step"]) == ("tiny_run (step 1)", 1)
    assert last.sha256 == newest.sha256 != first.sha256


def test_an_export_is_the_run_itself_to_the_bit(run: Path, exported: Path, gray: Dataset) -> None:
    """Also one of a 3x3 stem, which is stored as a 7x7 one for images enlarged twice."""
    ours, theirs = (open_source(str(folder), dataset=gray) for folder in (run, exported))
    assert torch.equal(of(ours), of(theirs))
    assert ours.sha256 == theirs.sha256
    assert theirs.preprocessing.size == 32
    assert (theirs.name, theirs.kind) == ("tiny", "export")
    plain = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.inference_mode():
        enlarged = plain(nn.functional.interpolate(IMAGES, scale_factor=2))
    torch.testing.assert_close(of(theirs), enlarged, rtol=0, atol=1e-4)


def test_the_hash_changes_with_weights_and_preprocessing_and_nothing_else(copied: Path, gray: Dataset) -> None:
    before = open_source(str(copied), dataset=gray).sha256
    config = json.loads((copied / "config.json").read_text())
    config["pretrained_cfg"]["tag"] = "renamed"
    (copied / "config.json").write_text(json.dumps(config))
    assert open_source(str(copied), dataset=gray).sha256 == before
    state = load_file(copied / "model.safetensors")
    state["layer4.1.bn2.bias"][7] += 1e-6
    save_file(state, copied / "model.safetensors")
    say(copied, weights_sha256=file_sha256(copied / "model.safetensors"))
    changed = open_source(str(copied), dataset=gray).sha256
    say(copied, std=[0.5])
    assert len({before, changed, open_source(str(copied), dataset=gray).sha256}) == 3


def test_an_export_of_a_newer_version_is_refused_in_one_line(copied: Path, gray: Dataset) -> None:
    say(copied, version=99)
    with pytest.raises(UserError, match="newer medpretrain") as refused:
        open_source(str(copied), dataset=gray)
    assert "\n" not in str(refused.value)
    assert str(copied) in str(refused.value)


def test_an_untrained_network_is_that_of_its_seed(run: Path, exported: Path, gray: Dataset) -> None:
    spec = f"random:{run}"
    zero, again, one = (open_source(spec, dataset=gray, seed=seed) for seed in (0, 0, 1))
    assert zero.sha256 == again.sha256 != one.sha256
    assert zero.sha256 == open_source(f"random:{exported}", dataset=gray).sha256
    assert zero.sha256 != open_source(str(run), dataset=gray).sha256
    assert (zero.name, zero.kind, zero.about["seed"]) == ("random (resnet18)", "random", 0)
    assert open_source(spec, dataset=gray).about["seed"] == 5  # the run's own: the weights it began with
    assert zero.preprocessing == load_run(run).preprocessing


def test_a_random_network_takes_what_it_lacks_from_the_dataset(gray: Dataset, colour_dataset: Path) -> None:
    colour = Dataset.open(colour_dataset)
    source = open_source("random:resnet10t", dataset=colour)
    assert colour.info.statistics is not None
    assert source.preprocessing == Preprocessing(
        32, 3, tuple(colour.info.statistics.mean), tuple(colour.info.statistics.std)
    )
    assert (source.name, source.kind, source.architecture) == ("random (resnet10t)", "random", "resnet10t")
    assert open_source("random:resnet10t", dataset=gray).preprocessing.channels == 1
    assert open_source("random:resnet10t", dataset=gray, size=48).preprocessing.size == 48
    assert open_source("random:vit_tiny_patch16_224", dataset=gray).preprocessing.size == 224


def test_weights_of_timm_come_with_their_own_preprocessing(
    gray: Dataset, colour_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def offline(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        asked.append((name, pretrained, options))
        return module_create(name, **options)

    module_create = module.create_backbone
    monkeypatch.setattr(module, "create_backbone", offline)
    source = open_source("timm:resnet18.a1_in1k", dataset=Dataset.open(colour_dataset))
    assert asked == [("resnet18.a1_in1k", True, {"channels": 3, "image_size": 224})]
    assert source.preprocessing == Preprocessing(224, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert source.about["weights"] == "resnet18.a1_in1k"
    assert (source.name, source.architecture) == ("resnet18.a1_in1k", "resnet18")
    averaged = open_source("timm:resnet18", dataset=gray, size=64).preprocessing
    assert (averaged.size, averaged.channels) == (64, 1)
    assert averaged.mean == pytest.approx([0.449])
    assert averaged.std == pytest.approx([0.226])


def test_weights_of_timm_that_are_out_of_reach_are_said_to_be(gray: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"could not be fetched.*need a network, or a copy of them in the Hugging Face"):
        open_source("timm:resnet18", dataset=gray)


@pytest.mark.parametrize(
    ("spec", "messages"),
    [
        ("timm:resnt18", ["did you mean 'resnet18'", "random:FOLDER"]),
        ("random:resnt18", ["did you mean 'resnet18'", "no folder", "timm:NAME"]),
        ("timm:resnet18.a1_in2k", ["did you mean 'resnet18.a1_in1k'"]),
        ("timm:", ["timm has no model ''", "random:FOLDER"]),
        ("resnet18", ["say timm:resnet18 or random:resnet18"]),
        ("runs/nothing_there", ["there is no folder", "timm:NAME", "export"]),
    ],
)
def test_what_is_none_of_the_forms_is_answered_with_the_forms_and_the_nearest_name(
    spec: str, messages: list[str], gray: Dataset
) -> None:
    with pytest.raises(UserError) as refused:
        open_source(spec, dataset=gray)
    for message in messages:
        assert message in str(refused.value)


def test_a_folder_of_something_else_and_a_size_for_what_has_one_are_refused(
    tmp_path: Path, run: Path, gray: Dataset
) -> None:
    with pytest.raises(UserError, match="neither a run, a checkpoint nor an export"):
        open_source(str(tmp_path), dataset=gray)
    with pytest.raises(UserError, match="has its own image size"):
        open_source(str(run), dataset=gray, size=64)


def test_channels_are_converted_and_it_is_said_and_another_bit_depth_is_refused(
    run: Path, gray: Dataset, colour_dataset: Path, tmp_path: Path
) -> None:
    colour = Dataset.open(colour_dataset)
    one, three = Preprocessing(32, 1, (0.5,), (0.5,)), Preprocessing(32, 3, (0.5,) * 3, (0.5,) * 3)
    assert conversion(one, gray) is conversion(three, colour) is None
    assert conversion(one, colour) == "colour images as their luma"
    assert conversion(three, gray) == "gray images as three equal channels"
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(4):
        pixels = np.linspace(20000, 20400 + number, 32 * 32).reshape(32, 32).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "images" / "a" / f"{number}.png")
    prepare(tmp_path / "images", tmp_path / "shards", split={"train": 1.0})
    deep = Dataset.open(tmp_path / "shards")
    with pytest.raises(UserError, match="images of 16 bits and the network saw images of 8"):
        open_source(str(run), dataset=deep)
    assert open_source("random:resnet10t", dataset=deep).preprocessing.bit_depth == 16


def test_a_network_to_be_changed_is_a_copy(gray: Dataset) -> None:
    source = open_source("random:resnet10t", dataset=gray)
    before = of(source)
    with torch.no_grad():
        for parameter in source.network().parameters():
            parameter.zero_()
    assert torch.equal(of(source), before)
