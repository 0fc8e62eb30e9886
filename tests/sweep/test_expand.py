"""If these fail, a sweep does not vary what it says it varies."""

from __future__ import annotations

import pytest

from data_prep.errors import UserError
from medpretrain.data.views import Augmentation
from medpretrain.recipe_file import load_recipe
from medpretrain.sweep.expand import expand
from medpretrain.sweep.sweep_file import Sweep
from medpretrain.sweep.transformations import ALL, switched_on

FIVE = ("crop", "flip", "jitter", "grayscale", "blur")
BASE = "simclr_medmnist"


def sweep(recipe=BASE, **content) -> Sweep:
    return Sweep.model_validate({"name": "mine", "recipe": recipe, "evaluate": [{"protocol": "linear"}], **content})


def on(view: Augmentation) -> set[str]:
    return {name for name in ALL if getattr(view, name) != Augmentation.model_fields[name].default}


def test_pairs_together_leave_both_on_and_nothing_else_each_pair_once():
    base = load_recipe(BASE).views["crop"]
    runs = expand(sweep(pairs={"how": "together"}))
    seen = [frozenset((run.axes["first"], run.axes["second"])) for run in runs]
    assert len(seen) == len(set(seen)) == 15
    for run, pair in zip(runs, seen, strict=True):
        view = run.resolved.views["crop"]
        assert on(view) == pair
        assert view.second is None
        assert all(getattr(view, name) == getattr(base, name) for name in pair)
        assert run.name == "-".join(dict.fromkeys((run.axes["first"], run.axes["second"])))


def test_pairs_apart_leave_one_on_the_first_view_and_one_on_the_second():
    base = load_recipe(BASE).views["crop"]
    runs = expand(sweep(pairs={"how": "apart", "transformations": ["crop", "jitter", "flip"]}))
    assert len({(run.axes["first"], run.axes["second"]) for run in runs}) == 9
    for run in runs:
        view = run.resolved.views["crop"]
        assert on(view.of(0)) == {run.axes["first"]}
        assert on(view.of(1)) == {run.axes["second"]}
        assert getattr(view.of(1), run.axes["second"]) == getattr(base, run.axes["second"])


def test_pairs_apart_keep_the_strength_that_only_the_second_view_has():
    recipe = ["views.crop.blur=null", "views.crop.second={blur: {p: 0.1}, flip: 0.2}"]
    pairs = {"how": "apart", "transformations": ["blur", "flip"]}
    runs = {run.name: run.resolved.views["crop"] for run in expand(sweep(pairs=pairs), recipe)}
    assert runs["blur-flip"].of(0).blur.p == 0.1
    assert runs["blur-flip"].of(1).flip == 0.5  # the first view's, where both have it
    assert on(runs["flip-blur"].of(0)) == {"flip"}
    assert runs["flip-blur"].of(1).blur.p == 0.1


def test_pairs_apart_refuse_a_recipe_with_other_than_two_views():
    with pytest.raises(UserError, match=r"views.crop.count=3; a pair.*take pairs.how: together"):
        expand(sweep(pairs={"how": "apart"}), ["views.crop.count=3"])


def test_leave_one_out_has_the_whole_and_each_without_one():
    base = load_recipe(BASE).views["crop"]
    full, *rest = expand(sweep(leave_one_out={}))
    assert full.resolved.views["crop"] == base
    assert [run.axes["removed"] for run in rest] == list(FIVE)
    for run in rest:
        assert on(run.resolved.views["crop"]) == set(FIVE) - {run.axes["removed"]}
        assert run.name == f"no-{run.axes['removed']}"


def test_leave_one_out_leaves_it_out_of_every_view():
    recipe = ["views.crop.second={blur: {p: 0.1}, jitter: {brightness: 0.1}}"]
    runs = {run.name: run.resolved.views["crop"] for run in expand(sweep(leave_one_out={}), recipe)}
    assert on(runs["no-blur"].second) == {"jitter"}
    for run in expand(sweep("demo_dino", leave_one_out={})):
        assert run.axes["removed"] not in switched_on(run.resolved)


def test_a_transformation_that_the_recipe_does_not_have_is_named():
    with pytest.raises(UserError, match=r"recipe simclr_medmnist has crop, .* on, and not 'noise'"):
        expand(sweep(leave_one_out={"transformations": ["noise"]}))
    assert expand(sweep(leave_one_out={"transformations": ["noise"]}), ["views.crop.noise={p: 0.5}"])


def test_a_grid_is_every_combination_with_recipes_and_seeds():
    axes = [
        {"name": "batch size", "set": ["train.global_batch={}"], "values": [4, 8]},
        {"name": "colour", "cases": {"strong": [], "none": ["views.crop.jitter=null"]}},
    ]
    runs = expand(sweep([BASE, "barlow_twins_medmnist"], grid=axes, seeds=[0, 7]))
    assert len(runs) == 16
    assert len({run.resolved.sha256 for run in runs}) == 16
    for run in runs:
        recipe, axes = run.resolved, dict(run.axes)
        jitter = "none" if recipe.views["crop"].jitter is None else "strong"
        assert axes == {
            "recipe": {"simclr": BASE, "barlow_twins": "barlow_twins_medmnist"}[recipe.method["name"]],
            "batch size": recipe.train.global_batch,
            "colour": jitter,
            "seed": recipe.seed,
        }
        assert recipe.name == f"mine-{run.name}"
    assert runs[0].name == "simclr_medmnist-batch-size-4-colour-strong-seed-0"


def test_overrides_of_the_command_come_after_the_sweeps_and_before_the_axes():
    grid = [{"name": "epochs", "set": ["train.epochs={}"], "values": [1, 2]}]
    runs = expand(
        sweep(grid=grid, overrides=["optim.lr=0.1", "train.global_batch=16"]), ["optim.lr=0.2", "train.steps=9"]
    )
    assert [(run.resolved.optim.lr, run.resolved.train.global_batch) for run in runs] == [(0.2, 16)] * 2
    assert [(run.resolved.train.epochs, run.resolved.train.steps) for run in runs] == [(1, None), (2, None)]


def test_a_list_of_values_may_hold_text_and_lists_of_widths():
    grid = [{"name": "width", "set": ["method.projector=[512, {}]"], "values": [32, 64]}]
    assert [run.resolved.method["projector"] for run in expand(sweep(grid=grid))] == [[512, 32], [512, 64]]
    grid = [{"name": "net", "set": ["backbone.name={}"], "values": ["resnet18", "resnet10t"]}]
    assert [run.resolved.backbone.name for run in expand(sweep(grid=grid))] == ["resnet18", "resnet10t"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"name": "batch", "set": ["train.global_bacth={}"], "values": [4, 8]},
            r"sweep mine, batch 4: override train.global_bacth: unknown key.*did you mean 'global_batch'",
        ),
        (
            {"name": "batch", "set": ["train.global_batch={}"], "values": [4, 0]},
            r"sweep mine, batch 0: override train.global_batch: .*greater than or equal to 1",
        ),
        ({"name": "x", "cases": {"a": ["optim.lr"]}}, r"sweep mine, x a: an override reads key=value"),
        ({"name": "b", "cases": {"a": [], "A": []}}, r"two runs would both be called 'b-A'"),
    ],
)
def test_a_mistake_in_an_axis_names_it_and_its_value(grid, message):
    with pytest.raises(UserError, match=message):
        expand(sweep(grid=[grid]))


def test_a_mistake_in_an_override_of_all_runs_names_no_axis():
    with pytest.raises(UserError, match=r"^sweep mine: override optim.lrr: unknown key"):
        expand(sweep(leave_one_out={}), ["optim.lrr=1"])


def test_a_password_is_refused_before_a_plan_would_show_it():
    with pytest.raises(UserError, match="password"):
        expand(sweep(leave_one_out={}), ["tracking.uri=https://me:secret@host"])
