"""The method of docs/adding_a_method.md works as it is printed there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from medpretrain.methods import METHODS
from medpretrain.recipe_file import load_recipe
from medpretrain.training.loop import train

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
RECIPE = """\
name: simsiam
data: {{path: {dataset}, channels: 1, threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, count: 2, crop: [0.5, 1.0]}}}}
method: {{name: simsiam, projector: [16, 8], predictor: [4, 8]}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 2, global_batch: 8, threads: 1}}
device: cpu
tracking: {{uri: none}}
"""


@pytest.fixture
def simsiam(monkeypatch, exactness):
    """Its file, its line in the registry and its case, all taken from the page."""
    text = PAGE.read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (place,) = re.findall(r'"simsiam": "([\w.:]+)",', text)
    (case,) = re.findall(r'"simsiam": (Case\(.*?\)),', text)
    module = types.ModuleType(place.partition(":")[0])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "simsiam", place)
    monkeypatch.setitem(exactness.CASES, "simsiam", eval(case, {"Case": exactness.Case}))


def test_the_page_is_short():
    assert len(PAGE.read_text().splitlines()) < 60


def test_it_passes_the_tests_of_every_method(simsiam, exactness):
    assert exactness.resumed_to_the_bit("simsiam", "resnet")
    whole, parts = (
        exactness.gradients(exactness.ALONE, "simsiam", "vit", micro_batches=count, plain_heads=True)
        for count in (1, 3)
    )
    compared = exactness.compare(parts, whole)
    assert abs(compared["ratio"] - 1) < 1e-8, compared
    assert abs(compared["cosine"] - 1) < 1e-8, compared


def test_a_run_trains_it(simsiam, small_dataset, tmp_path):
    file = tmp_path / "simsiam.yaml"
    file.write_text(RECIPE.format(dataset=small_dataset))
    finished = train(load_recipe(str(file), [f"run.dir={tmp_path / 'run'}"]))
    assert finished.step == 2
