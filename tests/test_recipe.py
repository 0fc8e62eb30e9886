"""A wrong recipe is one line that says where and what would be right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_prep.errors import UserError
from medpretrain.methods import METHODS
from medpretrain.recipe_file import dump_recipe, load_recipe, read_recipe, recipe_files

RECIPE = """\
name: mine
data: {channels: 1, labels: [modality]}
backbone: {name: resnet18}
views:
  crop:
    size: 64
    count: 2
    jitter: {brightness: 0.4}
method: {name: modan_mulsupcon}
optim: {name: sgd, lr: 5e-2}
train: {epochs: 10, global_batch: 16}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_reads_back_to_itself(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert read_recipe(dump_recipe(recipe)) == recipe
    assert read_recipe(dump_recipe(recipe)).sha256 == recipe.sha256


def test_every_method_has_a_recipe_of_its_name():
    named = {(load_recipe(name).method["name"], name) for name in recipe_files()}
    assert {method for method, name in named if name.startswith(method)} == set(METHODS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("brightness", "brigthness"), r"mine.yaml:8: unknown key 'brigthness'; did you mean 'brightness'\?"),
        (("optim:", "optimizer:"), r"unknown key 'optimizer'; did you mean 'optim'\?|optim is missing"),
        (("lr: 5e-2", "lr: fast"), r"mine.yaml:10: optim.lr: .*number \(given: 'fast'\)"),
        (("lr: 5e-2", "lr: -1"), r"mine.yaml:10: optim.lr: .*greater than 0"),
        (("size: 64", "size: 64.5"), r"mine.yaml:6: views.crop.size"),
        (("size: 64", "size: '64'"), r"mine.yaml:6: views.crop.size"),
        (("modan_mulsupcon", "modan_mulsupcom"), r"mine.yaml:9: .*did you mean 'modan_mulsupcon'\?"),
        (
            ("modan_mulsupcon}", "modan_mulsupcon, temprature: 1}"),
            r"mine.yaml:9: unknown key 'temprature'.*temperature",
        ),
        (("  crop:", "  crops:"), r"mine.yaml:5: .*no view 'crops'; did you mean 'crop'\?"),
        ((", labels: [modality]", ""), r"learns from labels"),
        (("epochs: 10", "epochs: 10, steps: 5"), r"mine.yaml:11: train: give either steps or epochs"),
        (("global_batch: 16", ""), r"mine.yaml:11: the key train.global_batch is missing"),
        (("name: mine", "name: [mine"), r"mine.yaml:\d+: not YAML"),
        (("channels: 1", "channels: 2"), r"mine.yaml:2: data.channels"),
        (("channels: 1", "channels: 1, mean: [0.1]"), r"given together"),
        (("channels: 1", "channels: 1, weigths: [1]"), r"mine.yaml:2: unknown key 'weigths'; did you mean 'weights'\?"),
        (
            ("channels: 1", "channels: 1, path: [a, b],\n  weights: [1, 2, 3]"),
            r"mine.yaml:2: data: weights need one value for each of the 2 datasets",
        ),
        (("channels: 1", "channels: 1, path: [a, b],\n  weights: [1, 0]"), r"mine.yaml:3: data.weights.1: .*than 0"),
        (("channels: 1", "channels: 1, weights: [.inf]"), r"mine.yaml:2: data.weights.0: .*finite"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(change, message, write):
    with pytest.raises(UserError, match=message):
        load_recipe(write(RECIPE.replace(*change)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"override optim.lrr: unknown key 'lrr'; did you mean 'lr'\?"),
        ("optim.lr=abc", r"override optim.lr: .*number \(given: 'abc'\)"),
        ("data.path=3", r"override data.path: give a folder, or a list of folders \(given: 3\)"),
        ("data.path=[a, 3]", r"override data.path: data.path.1: .*string \(given: 3\)"),
        ("data.weights=2", r"override data.weights: .*\(given: 2\)"),
        ("optim", "key=value"),
        ("=3", "key=value"),
        ("name.x=3", "name is not a section"),
        ("optim.lr=[", "not YAML"),
    ],
)
def test_mistakes_in_an_override_are_named(override, message, write):
    with pytest.raises(UserError, match=message):
        load_recipe(write(RECIPE), [override])


def test_overrides_take_the_place_of_what_the_file_says(write):
    recipe = load_recipe(
        write(RECIPE), ["optim.lr=3e-4", "views.crop.crop=[0.5, 1]", "train.steps=7", "method.threshold=0.5"]
    )
    assert recipe.optim.lr == 3e-4
    assert recipe.views["crop"].crop == (0.5, 1.0)
    assert (recipe.train.steps, recipe.train.epochs) == (7, None)
    assert recipe.method["threshold"] == 0.5
    assert recipe.method["temperature"] == 0.07


def test_a_folder_or_several_with_weights(write):
    assert load_recipe(write(RECIPE)).data.path == ()
    assert load_recipe(write(RECIPE), ["data.path=one"]).data.path == ("one",)
    several = load_recipe(write(RECIPE), ["data.path=[one,two]", "data.weights=[1, 0.5]"])
    assert several.data.path == ("one", "two")
    assert several.data.weights == (1.0, 0.5)
    assert read_recipe(dump_recipe(several)) == several
    in_file = RECIPE.replace("channels: 1", "path: [one, two], channels: 1")
    assert load_recipe(write(in_file)).data.path == ("one", "two")


def test_the_identity_changes_with_what_is_trained_and_not_with_where(write):
    plain = load_recipe(write(RECIPE))
    for elsewhere in (
        "run.dir=x",
        "device=cpu",
        "data.path=y",
        "data.path=[y,z]",
        "tracking.uri=none",
        "train.log_every=3",
    ):
        assert load_recipe(write(RECIPE), [elsewhere]).sha256 == plain.sha256
    for otherwise in (
        "seed=1",
        "optim.lr=0.1",
        "method.threshold=0.4",
        "views.crop.flip=0.5",
        "train.epochs=11",
        "data.weights=[1]",
    ):
        assert load_recipe(write(RECIPE), [otherwise]).sha256 != plain.sha256


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'amimv_medmnist'"):
        load_recipe("amimv_medmist")
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe("nowhere.yaml")


def test_recipes_and_preparation_need_no_torch():
    code = """
import sys
class NoTorch:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "nvidia", "timm", "torchvision", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
import data_prep.cli, launchers
from medpretrain.cli import app
from medpretrain.recipe_file import load_recipe
print(load_recipe("dino_retina_weak").name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "dino_retina_weak" in done.stdout
    assert "method's options" in done.stderr  # what was not checked is said
