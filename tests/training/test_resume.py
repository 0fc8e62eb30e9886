"""A run that was killed ends as if it had not been, and no sample is lost or seen twice."""

from __future__ import annotations

import random

import jobs
import pytest

from data_prep.dataset import Dataset

STEPS, EVERY = 14, 3


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "world", "strategy"),
    [("dino", 1, "ddp"), ("modan_mulsupcon", 2, "fsdp2"), ("amimv", 1, "ddp"), ("kcl", 2, "deepspeed")],
)
def test_a_killed_and_resumed_run_is_bit_identical_to_an_undisturbed_one(
    method, world, strategy, tmp_path, small_dataset
):
    seed = random.randrange(10**6)
    at = random.Random(seed).randrange(1, STEPS - 2)
    recipe = jobs.write_recipe(tmp_path / "recipe.yaml", method, small_dataset, steps=STEPS, every=EVERY)
    whole, killed, option = tmp_path / "whole", tmp_path / "killed", f"strategy={strategy}"
    jobs.Job(recipe, whole, world, option).end()
    last = jobs.Job(recipe, killed, world, option).kill_after(killed, at)
    print(f"seed {seed}: killed after step {last}")
    there = jobs.committed(killed)
    jobs.Job(recipe, killed, world, option).end()

    assert jobs.starts(killed) == [0, there]
    assert not jobs.difference(killed, whole, STEPS)


@pytest.mark.distributed
def test_another_strategy_on_fewer_ranks_goes_on_with_the_same_samples_and_augmentations(
    tmp_path, small_dataset, colour_dataset
):
    seed = random.randrange(10**6)
    at = random.Random(seed).randrange(EVERY, STEPS - 2)
    print(f"seed {seed}: killed after step {at}")
    recipe = jobs.write_recipe(
        tmp_path / "recipe.yaml",
        "modan_mulsupcon",
        f"[{small_dataset}, {colour_dataset}]",
        steps=STEPS,
        every=EVERY,
        weights="weights: [3, 1],",
    )
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    jobs.Job(recipe, whole, 2).end()
    jobs.Job(recipe, changed, 2, "strategy=fsdp2").kill_after(changed, at)
    jobs.Job(recipe, changed, 1).end()

    assert max(jobs.loss_differences(changed, whole)) < 1e-2
    found = jobs.seen(changed, STEPS).keys()
    assert found == jobs.seen(whole, STEPS).keys()
    assert len(found) == STEPS * jobs.BATCH
    second = len(Dataset.open(small_dataset))  # the first row of the second dataset
    parts = [[place for place in found if (place[2] >= second) == other] for other in (False, True)]
    assert [len(part) for part in parts] == [STEPS * jobs.BATCH * 3 / 4, STEPS * jobs.BATCH / 4]
    for part in parts:
        samples = [sample for _, epoch, sample, _ in part if epoch == 0]
        assert len(samples) == len(set(samples)), "a sample was seen twice in an epoch"
        last = max(epoch for _, epoch, _, _ in part)
        assert last >= 1
        rows = {sample for _, epoch, sample, _ in part if epoch < last}
        assert all({sample for _, epoch, sample, _ in part if epoch == one} == rows for one in range(last))
