"""What cannot be trained is refused before anything starts: no network trained, no folder made."""

from __future__ import annotations

import pytest

from data_prep.errors import UserError
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import load_recipe
from medpretrain.training import loop
from medpretrain.training.build import refuse_batchnorm_of_one

RECIPE = """\
name: refused
data: {{path: {dataset}, channels: 1, labels: [class], threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, count: 2}}}}
method: {{name: {method}, projector: [16, 8]}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 2, global_batch: 8, threads: 1}}
device: cpu
tracking: {{uri: none}}
"""


@pytest.fixture
def refusal(tmp_path, small_dataset):
    """What training says of a method on three classes of equal size, with some keys changed."""

    def said(method: str, *overrides: str) -> str:
        file = tmp_path / "refused.yaml"
        file.write_text(RECIPE.format(dataset=small_dataset, method=method))
        with pytest.raises(UserError) as error:
            loop.train(load_recipe(str(file), [f"run.dir={tmp_path / 'run'}", *overrides]))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    return said


def test_a_label_that_the_dataset_lacks(refusal):
    assert "there is no label 'klass'" in (said := refusal("supcon", "data.labels=[klass]"))
    assert "did you mean 'class'" in said


def test_no_label_where_one_is_learnt_from(refusal):
    assert "method bcl learns from labels; name them" in refusal("bcl", "data.labels=[]")


def test_several_labels_where_one_is_learnt_from(refusal):
    said = refusal("kcl", "method.queue=8", "data.labels=[modality, anatomy]")
    assert "learns from one label kind and data.labels names 2" in said


def test_supervised_minority_on_three_classes(refusal):
    said = refusal("supervised_minority")
    assert "learns from two classes, and data.labels=[class] has images of 3" in said
    assert "set method.name to supcon" in said


def test_supervised_minority_on_two_equal_classes(colour_dataset, refusal):
    said = refusal("supervised_minority", f"data.path={colour_dataset}")
    assert "needs a rarer class" in said
    assert "set method.name to supervised_prototypes or supcon" in said


@pytest.mark.parametrize("method", ["kcl", "nnclr", "paco", "tsc"])
def test_a_queue_shorter_than_a_batch(method, refusal):
    assert "set method.queue to at least 8, or train.global_batch to at most 7" in refusal(method, "method.queue=7")


def test_a_batch_smaller_than_the_classes(refusal):
    assert "set train.global_batch to at least 3" in refusal("bcl", "train.global_batch=2")


@pytest.mark.parametrize("method", ["barlow_twins", "byol", "kcl", "tsc", "paco", "vicreg"])
def test_views_that_nothing_would_look_at(method, refusal):
    said = refusal(method, "views.crop.count=3", *(["method.predictor=[8]"] if method == "byol" else []))
    assert f"method {method} uses exactly 2 views 'crop' of each image" in said


def test_batchnorm_that_sees_one_image(refusal):
    said = refusal("supcon", "train.global_batch=4", "train.micro_batches=4")
    assert "BatchNorm would see one image at a time: train.global_batch=4 over 1 processes x 4 micro-batches" in said
    assert "sync_batchnorm" not in said  # which one process has nothing to do with


@pytest.mark.parametrize(
    ("batch", "world", "sync", "said"),
    [(8, 8, False, "train.sync_batchnorm=true"), (8, 8, True, None), (16, 8, False, None), (1, 1, True, "a larger")],
)
def test_batchnorm_on_ranks(batch, world, sync, said, exactness):
    chosen = exactness.recipe("simclr", "resnet")
    sizes = {"global_batch": batch, "sync_batchnorm": sync}
    recipe: Recipe = chosen.model_copy(update={"train": chosen.train.model_copy(update=sizes)})
    method = exactness.trainer(chosen, exactness.ALONE, exactness.torch.float32).method
    if said is None:
        refuse_batchnorm_of_one(method, recipe, world)
        return
    with pytest.raises(UserError, match=said):
        refuse_batchnorm_of_one(method, recipe, world)
