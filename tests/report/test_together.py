"""Pretrainings that differ in their seed alone are one method, and each counts once."""

from __future__ import annotations

import numpy as np
import pytest

from medpretrain.evaluation import results
from medpretrain.report.gather import gather
from medpretrain.report.section_runs import recipe_differences
from medpretrain.report.together import with_families
from tests.report.example import evaluated, source, write_run


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two recipes of three pretrainings each, and an untrained backbone."""
    folder = tmp_path_factory.mktemp("seeds")
    places = []
    for method, name in (("weak", "simclr"), ("strong", "mulsupcon")):
        for seed in range(3):
            run = write_run(folder / f"{method}_{seed}", name, seed=seed)
            text = (run / "recipe.yaml").read_text()
            (run / "recipe.yaml").write_text(text.replace(f"name: {name}\n", f"name: {method}_{seed}\n", 1))
            evaluation, predictions = evaluated(name, repeats=2, folds=2, strength=1 + seed)
            own = source(f"{method}_{seed}", "run", seed=seed, setting_sha256=method)
            results.write(run / "evaluation", evaluation.model_copy(update={"source": own}), predictions)
            places.append(run)
    results.write(folder / "random", *evaluated("random", repeats=2, folds=2, kind="random"))
    return with_families(gather([*places, folder / "random"]))


def test_seeds_are_found_and_named(material):
    assert material.families == {"weak": ["weak_0", "weak_1", "weak_2"], "strong": ["strong_0", "strong_1", "strong_2"]}
    assert [method.name for method in material.methods[:2]] == ["weak", "strong"]


def test_the_first_table_is_of_families_and_the_pretrainings_follow_in_short(material):
    together, alone = material.groups
    assert [one.method.name for one in together.measured] == ["weak", "strong"]
    assert (together.pretrainings, together.in_short) == (3, False)
    assert len(alone.measured) == 7
    assert alone.in_short


def test_each_pretraining_counts_once_by_the_mean_over_its_classifiers(material):
    together, alone = material.groups
    members = [one.evaluation for one in alone.measured[:3]]
    means = [np.mean([unit.metrics.auroc for unit in one.units]) for one in members]
    merged = together.measured[0].evaluation
    summary = merged.summaries[0]
    assert summary.mean["auroc"] == pytest.approx(np.mean(means), abs=1e-12)
    assert summary.sd is not None
    assert summary.sd["auroc"] == pytest.approx(np.std(means, ddof=1), abs=1e-12)
    assert summary.units == 12
    assert merged.seeds == [0, 1, 2]
    assert len({unit.number for unit in merged.units}) == len(merged.units)


def test_recipes_of_one_family_differ_in_nothing_but_the_seed(material):
    assert recipe_differences(material.runs[:3]) == {
        "name": ["weak_0", "weak_1", "weak_2"],
        "seed": ["0", "1", "2"],
    }
    between = recipe_differences([material.runs[0], material.runs[3]])
    assert between["method.name"] == ["dino", "modan_mulsupcon"]
    assert between["views.crop"][0] == "none"
    assert "size 32" in between["views.crop"][1]
