"""A wrong sweep is one line that says where and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from medpretrain.evaluation.metrics import SCALARS
from medpretrain.recipe_file import recipe_files
from medpretrain.sweep.expand import expand
from medpretrain.sweep.sweep_file import METRICS, Evaluate, load_sweep, sweep_files

GOOD = """\
name: mine
recipe: simclr_medmnist
grid:
  - {name: batch, set: ["train.global_batch={}"], values: [4, 8]}
evaluate: [{protocol: linear}]
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_sweep(str(path))

    return load


@pytest.mark.parametrize("name", sweep_files())
def test_every_shipped_sweep_expands_to_recipes_that_can_be_trained(name):
    sweep = load_sweep(name)
    assert sweep.name == name
    assert sweep.about
    runs = expand(sweep, ["data.path=shards"])
    assert len(runs) == len({run.name for run in runs}) == len({run.resolved.sha256 for run in runs})
    assert [run.number for run in runs] == list(range(len(runs)))


def test_sweeps_are_not_listed_as_recipes():
    assert not set(sweep_files()) & set(recipe_files())


def test_the_metrics_are_those_of_an_evaluation():
    assert METRICS == SCALARS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("grid:", "gird:"), r"mine.yaml:3: unknown key 'gird'; did you mean 'grid'\?"),
        (("protocol: linear", "protocoll: linear"), r"mine.yaml:5: .*protocol"),
        (("protocol: linear", "protocol: linar"), r"mine.yaml:5: evaluate.0.protocol: "),
        (("values: [4, 8]", "values: [4, 4]"), r"mine.yaml:4: grid.0: a value stands twice"),
        (("values: [4, 8]", "cases: {a: []}"), r"mine.yaml:4: grid.0: an axis has values and set, or cases"),
        (("batch={}", "batch=4"), r"mine.yaml:4: grid.0: no override in set has a \{\}"),
        (("evaluate: [{protocol: linear}]", "evaluate: []"), r"mine.yaml:5: evaluate"),
        (("evaluate:", "metric: acuracy\nevaluate:"), r"no metric 'acuracy'; did you mean 'accuracy'\?"),
        (("evaluate:", "leave_one_out: {}\nevaluate:"), "give one of pairs, leave_one_out and grid"),
        (("simclr_medmnist", "[simclr, simclr]"), "a recipe stands twice"),
        (("name: mine", "name: my sweep"), r"mine.yaml:1: name"),
        (("evaluate:", "pairs: {how: both}\nevaluate:"), r"mine.yaml:5: pairs.how"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(change, message, load):
    with pytest.raises(UserError, match=message):
        load(GOOD.replace(*change))


def test_a_sweep_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no sweep 'batch_sise'; did you mean 'batch_size'\?"):
        load_sweep("batch_sise")
    with pytest.raises(UserError, match=r"no sweep file nowhere.yaml"):
        load_sweep("nowhere.yaml")


def test_an_evaluation_is_the_words_of_a_command():
    entry = Evaluate(protocol="knn", variant="weighted", fractions=(1, 10), options=("--k", "5"))
    words = ["--label", "class", "--variant", "weighted", "--fractions", "1,10"]
    assert entry.words(Path("run"), "shards", "auto") == ["evaluate", "knn", "run", "shards", *words, "--k", "5"]
    assert entry.words(Path("run"), "shards", "cpu")[-4:] == ["--device", "cpu", "--k", "5"]
    assert Evaluate(protocol="knn", dataset="other").words(Path("run"), "shards", "auto")[3] == "other"
