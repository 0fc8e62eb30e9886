"""Every row of the table passes, warns and fails for the reason it names, on made-up facts."""

from __future__ import annotations

import dataclasses

import pytest

from medpretrain.preflight.data import DatasetSeen
from medpretrain.preflight.facts import PACKAGES, Gpu, HostFacts
from medpretrain.preflight.judge import Clock, Hosts, judge
from medpretrain.preflight.judge_rehearsal import kept
from medpretrain.preflight.report import Link, Moved, RankReport, Rehearsed
from medpretrain.preflight.table import show
from medpretrain.preflight.target import TargetSeen
from medpretrain.recipe import Recipe, flatten

GB = 10**9
RECIPE = Recipe.model_validate(
    {
        "name": "made_up",
        "data": {"path": "shards"},
        "backbone": {"name": "resnet50"},
        "views": {"crop": {"size": 224}},
        "method": {"name": "simclr"},
        "optim": {"name": "sgd", "lr": 0.1},
        "train": {"steps": 10_000, "global_batch": 960},
    }
)
STEPS = Rehearsed(
    images=64,
    step_s=0.5,
    wait_s=0.01,
    first_s=4.0,
    decode_images_s=400.0,
    resident_bytes=8 * GB,
    peak_bytes=40 * GB,
    device_bytes=80 * GB,
    checkpoint_bytes=GB,
    gradient_bytes=GB,
    steps=10_000,
    done=0,
    not_finite=0,
    replaced=0,
    survey=0,
)


def host(name, **changes):
    facts = HostFacts(
        name=name,
        processes=2,
        versions={"python": "3.12.1"} | dict.fromkeys(PACKAGES, "1.0"),
        code="c0de" * 16,
        recipe=dict(flatten(RECIPE.resolved())),
        gpus=(Gpu("H100", 80 * GB),) * 2,
        gpu_problem=None,
        driver="570.86",
        cores=16,
        memory=128 * GB,
        shared_memory=64 * GB,
        network=name,
        gloo_address=f"10.0.0.{name[1:]}" if name[1:].isdigit() else "10.0.0.1",
        interfaces=("eth0",),
        target=TargetSeen("run/checkpoints", free=1000 * GB, write_bytes_s=GB),
        datasets=(DatasetSeen("shards", "da7a" * 16, 1000, 10, ("train-00001.tar",), GB),),
    )
    return dataclasses.replace(facts, **changes)


def several(count, **changes):
    """Host n0, n1, ...; changes: n1=dict(driver=...)."""
    return tuple(host(f"n{place}", **changes.get(f"n{place}", {})) for place in range(count))


def reports(count, slow=None, **changes):
    """Of two processes a host; changes of the steps: rank3=dict(step_s=...); `slow`: a place whose links are."""
    found = []
    for rank in range(2 * count):
        links = []
        shift = 1
        while shift < count and rank % 2 == 0:
            ends = (rank // 2 - shift) % count, rank // 2
            links.append(Link(*ends, Moved(GB, 1.0, GB / 100 if slow in ends else GB * 10)))
            shift *= 2
        one = RankReport(
            rank,
            f"n{rank // 2}",
            "the end",
            all_reduce_right=True,
            all_gather_right=True,
            all_reduce=Moved(GB, 0.1, 10 * GB),
            all_gather=Moved(GB, 0.1, 10 * GB),
            links=tuple(links),
            rehearsed=STEPS,
        )
        changed = changes.get(f"rank{rank}", {})
        steps = {key: changed.pop(key) for key in list(changed) if hasattr(STEPS, key)}
        if steps:
            changed["rehearsed"] = dataclasses.replace(STEPS, **steps)
        found.append(dataclasses.replace(one, **changed))
    return found


def table(hosts, those=None, recipe=RECIPE, **more):
    """The rows by check."""
    given = Hosts(tuple(hosts), more.pop("wanted", len(hosts)), **more)
    found = {}
    for row in judge(recipe, given, those):
        found.setdefault(row.check, []).append(row)
    return found


def bad(found):
    """(check, status, host) of all rows that do not pass."""
    return [
        (row.check, row.status, row.host) for rows in found.values() for row in rows if row.status in ("warn", "fail")
    ]


def one(found, check, status, host, *words):
    """The only row that does not pass."""
    assert bad(found) == [(check, status, host)]
    (row,) = (row for row in found[check] if row.status == status)
    for word in words:
        assert word in row.figures
    assert row.advice
    return row


def test_hosts_that_are_alike_pass_every_row():
    clocks = {f"n{place}": Clock(0.001, 0.0005) for place in range(1, 4)}
    shares = dict.fromkeys(clocks, True)
    found = table(several(4), reports(4), clocks=clocks, shares_target=shares)
    assert not bad(found)
    assert all(row.status == "pass" for rows in found.values() for row in rows)
    assert "2 x H100 (75 GiB), 2 processes" in found["GPUs"][0].figures
    assert "10.0 GB/s of bus bandwidth" in found["all-reduce"][0].figures
    assert "8 links" in found["links"][0].figures
    assert "1.4 h for 10,000 steps of 510.0 ms" in found["total time"][0].figures
    assert "a checkpoint 8.0 GB, 4 at a time 32.0 GB" in found["checkpoint room"][0].figures
    assert "2.0 s to write" in found["checkpoint time"][0].figures  # 2 GB of each host at 1 GB/s


def test_nothing_is_measured_where_a_host_fails():
    found = table(several(2, n1={"code": "0" * 64}))
    one(found, "code", "fail", "n1", "files 000000000000, elsewhere c0dec0dec0de")
    for check in ("all-reduce", "all-gather", "links", "rehearsal", "memory", "data rate", "total time"):
        assert [row.status for row in found[check]] == ["not measured"]


def test_hosts_that_do_not_answer_are_named():
    found = table(several(2), missing=("n2", "n3"), wanted=4)
    assert bad(found) == [("hosts", "fail", "n2"), ("hosts", "fail", "n3")]


def test_hosts_that_nobody_named_are_counted():
    one(table(several(2), wanted=4), "hosts", "fail", "", "2 of 4 did not answer")


def test_a_host_that_was_not_asked_for_is_named():
    found = table(several(2), strangers=("n1",), missing=("m1",))
    assert bad(found) == [("hosts", "fail", "m1"), ("hosts", "fail", "n1")]


def test_one_name_twice():
    one(table((host("n0"), host("n0"))), "hosts", "fail", "n0", "2 answered by this name")


def test_another_package_version_is_named_with_both_versions():
    versions = host("x").versions | {"timm": "0.9"}
    one(table(several(3, n2={"versions": versions})), "packages", "fail", "n2", "timm 0.9, elsewhere 1.0")


def test_the_version_that_most_have_is_the_right_one_also_where_the_head_has_another():
    versions = host("x").versions | {"torch": "2.11"}
    one(table(several(3, n0={"versions": versions})), "packages", "fail", "n0", "torch 2.11")


def test_a_host_without_torch():
    versions = host("x").versions | {"torch": None}
    row = one(table(several(3, n1={"versions": versions})), "packages", "fail", "n1", "torch is not installed")
    assert row.advice == "pip install torch"


@pytest.mark.parametrize(("strategy", "status"), [("ddp", None), ("deepspeed", "fail")])
def test_deepspeed_is_needed_where_it_trains(strategy, status):
    recipe = RECIPE.model_copy(update={"strategy": strategy})
    changed = {"versions": host("x").versions | {"deepspeed": None}}
    found = table(several(2, n0=changed, n1=changed), recipe=recipe)
    assert bad(found) == ([("packages", "fail", "n0, n1")] if status else [])


def test_a_host_whose_words_are_not_understood_has_another_medpretrain():
    found = table(several(1), other_code=("n1",), wanted=2)
    one(found, "packages", "fail", "n1", "another medpretrain")


def test_another_recipe_is_named_with_its_keys():
    recipe = host("x").recipe | {"optim.lr": 0.2}
    one(table(several(3, n1={"recipe": recipe})), "recipe", "fail", "n1", "optim.lr is 0.2, elsewhere 0.1")


def test_the_data_may_lie_elsewhere_on_a_host():
    recipe = host("x").recipe | {"data.path.0": "/scratch/shards"}
    one(table(several(2, n1={"recipe": recipe})), "recipe", "warn", "n1", "data.path.0 is /scratch/shards")


def test_fewer_gpus_other_gpus_and_none():
    fewer = {"gpus": (Gpu("H100", 80 * GB),), "processes": 1}
    one(table(several(3, n1=fewer)), "GPUs", "fail", "n1", "1 x H100 (75 GiB), 1 process, elsewhere 2 x H100")
    one(table(several(3, n2={"gpus": (Gpu("A100", 80 * GB),) * 2})), "GPUs", "fail", "n2", "A100")
    one(table(several(3, n2={"gpus": (Gpu("H100", 40 * GB),) * 2})), "GPUs", "fail", "n2", "37 GiB")
    assert not bad(table(several(3, n2={"gpus": (Gpu("H100", 80 * GB),) * 8}))), "two of eight train, as elsewhere"
    without = several(1, n0={"gpus": (), "processes": 1, "driver": None})
    one(table(without), "GPUs", "warn", "", "no GPU, 1 process: device=auto trains on the CPU")
    assert not bad(table(without, recipe=RECIPE.model_copy(update={"device": "cpu"})))
    cuda = RECIPE.model_copy(update={"device": "cuda"})
    one(table(without, recipe=cuda), "GPUs", "fail", "n0", "device=cuda")


def test_a_torch_that_does_not_see_the_gpus_of_the_driver():
    row = one(table(several(1, n0={"gpus": ()})), "GPUs", "fail", "n0", "torch sees no GPU though there is driver 570")
    assert "CUDA_VISIBLE_DEVICES" in row.advice


def test_a_gpu_that_torch_cannot_look_at():
    broken = {"gpus": (), "gpu_problem": "CUDA error: uncorrectable ECC error"}
    one(table(several(3, n1=broken)), "GPUs", "fail", "n1", "torch cannot look at them: CUDA error: uncorrectable ECC")


def test_every_host_is_named_in_full_and_shown_in_short(capsys):
    found = table(several(20, **{f"n{place}": {"code": "0" * 64} for place in range(9)}))
    (row,) = found["code"]
    assert row.host == "n0, n1, n2, n3, n4, n5, n6, n7, n8"
    show([row], several(20))
    printed = capsys.readouterr().out
    assert "and 1 more" in printed
    assert "look at n0, n1, n2, n3, n4, n5, n6, n7, n8" in printed


def test_more_processes_than_gpus():
    found = table(several(1, n0={"gpus": (Gpu("H100", 80 * GB),)}))
    one(found, "GPUs", "fail", "n0", "1 for 2 processes")


def test_another_driver():
    one(table(several(3, n1={"driver": "535.1"})), "driver", "warn", "n1", "535.1, elsewhere 570.86")


def test_a_batch_that_the_processes_cannot_share():
    found = table(several(3), recipe=_of_batch(1024))
    one(found, "global batch", "fail", "", "1024 images do not divide among 6 processes x 1 micro-batches")


def test_a_host_whose_own_name_is_loopback_to_it():
    row = one(table(several(2, n1={"gloo_address": "127.0.1.1"})), "address", "fail", "n1", "127.0.1.1")
    assert "GLOO_SOCKET_IFNAME=INTERFACE in its environment; it has eth0" in row.advice
    assert not bad(table(several(2, n1={"gloo_address": None}))), "an interface is named"
    same = {"gloo_address": "127.0.1.1", "network": "this machine's"}
    assert not bad(table(several(2, n0=same, n1=same))), "all are one machine"


def test_little_shared_memory():
    found = table(several(2, n1={"shared_memory": 64 << 20}))
    assert "--ipc=host" in one(found, "shared memory", "warn", "n1", "67.1 MB").advice


@pytest.mark.parametrize(
    ("ahead", "accuracy", "status", "words"),
    [
        (0.9, 0.001, None, ()),
        (1.4, 0.5, None, ()),  # it may be 0.9 s
        (-3.0, 0.001, "warn", ("3.0 s behind the head", "to 1.0 ms")),
        (59.0, 0.001, "warn", ("59.0 s ahead of the head",)),
        (61.0, 0.001, "fail", ("61.0 s ahead of the head",)),
    ],
)
def test_clocks_apart(ahead, accuracy, status, words):
    found = table(several(2), reports(2), clocks={"n1": Clock(ahead, accuracy)})
    if status is None:
        assert not bad(found)
    else:
        one(found, "clock", status, "n1", *words)


def test_a_host_that_falls_silent():
    one(table(several(2), clocks={"n1": None}), "clock", "fail", "n1", "does not answer any more")


def test_a_target_that_cannot_be_written_and_one_that_is_not_shared():
    full = {"target": TargetSeen("run/checkpoints", problem="run: No space left on device")}
    one(table(several(2, n1=full)), "checkpoint target", "fail", "n1", "No space left")
    shares = {"n1": False}
    one(table(several(2), shares_target=shares), "checkpoint target", "fail", "n1", "is not the folder that n0 sees")


def test_a_dataset_that_is_not_there_and_another_one_by_its_name():
    gone = {"datasets": (DatasetSeen("shards", problem="shards is no prepared dataset"),)}
    one(table(several(2, n1=gone)), "dataset", "fail", "n1", "no prepared dataset")
    other = {"datasets": (DatasetSeen("shards", "07" * 32, 1000, 10, (), GB),)}
    one(table(several(3, n1=other)), "dataset", "fail", "n1", "070707070707, elsewhere da7ada7ada7a")


def test_hosts_verify_more_shards_together():
    second = {"datasets": (DatasetSeen("shards", "da7a" * 16, 1000, 10, ("train-00002.tar",), GB),)}
    assert "2 of 10 shards verified" in table(several(2, n1=second))["dataset"][0].figures


def test_wrong_sums_name_rank_and_host():
    found = table(several(2), reports(2, rank3={"all_reduce_right": False}))
    one(found, "all-reduce", "fail", "n1", "wrong values on rank 3")
    found = table(several(2), reports(2, rank1={"all_gather_right": False}))
    one(found, "all-gather", "fail", "n0", "rank 1")


@pytest.mark.parametrize("slow", [0, 7, 63])
def test_one_slow_link_among_64_hosts_is_named_and_no_other(slow):
    found = table(several(64), reports(64, slow=slow), recipe=_of_batch(128))
    one(found, "links", "fail", f"n{slow}", "10.0 MB/s", "between others 10.0 GB/s")


@pytest.mark.parametrize("count", [3, 4, 5])
def test_one_slow_link_among_few_hosts_is_named_and_no_other(count):
    one(table(several(count), reports(count, slow=1), recipe=_of_batch(2 * count)), "links", "fail", "n1")


def test_of_two_hosts_both_ends_of_a_slow_way_are_named():
    there = reports(2)
    slow = Link(0, 1, Moved(GB, 1.0, GB / 100))
    there[2] = dataclasses.replace(there[2], links=(slow,))
    one(table(several(2), there), "links", "fail", "n0, n1", "10.0 MB/s from n0 to n1, 10.0 GB/s the other way")


def test_a_slower_link_that_no_step_feels_is_a_warning():
    there = reports(2, **{f"rank{rank}": {"gradient_bytes": 1000} for rank in range(4)})
    there[2] = dataclasses.replace(there[2], links=(Link(0, 1, Moved(GB, 1.0, GB / 100)),))
    one(table(several(2), there), "links", "warn", "n0, n1", "10.0 MB/s from n0 to n1")


def _of_batch(images):
    return RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"global_batch": images})})


def test_communication_that_takes_longer_than_computing():
    slow = {"all_reduce": Moved(GB, 10.0, 2 * GB)}
    row = one(
        table(several(2), reports(2, rank0=slow)),
        "communication",
        "warn",
        "n0, n1",
        "1.0 GB of gradients take 750.0 ms",
    )
    assert "500.0 ms" in row.figures


def test_the_process_that_failed_is_named_and_not_those_that_it_took_along():
    those = reports(
        2,
        rank2={"error": "out of GPU memory", "stage": "the first step", "rehearsed": None},
        rank0={"error": "another rank was lost", "consequence": True, "stage": "the first step", "rehearsed": None},
    )
    row = one(table(several(2), those), "rehearsal", "fail", "n1", "rank 2 while at the first step: out of GPU memory")
    assert "another rank" not in row.figures


def test_a_host_that_is_lost_is_named_and_not_those_that_waited_for_it():
    those = reports(
        2,
        rank2={"error": "its host does not answer any more", "lost": True, "rehearsed": None},
        rank0={"error": "Timed out waiting for clients. 1/2 clients joined", "rehearsed": None},
    )
    one(table(several(2), those), "rehearsal", "fail", "n1", "rank 2: its host does not answer any more")


def test_the_same_failure_of_all_is_one_row():
    same = {f"rank{rank}": {"error": "there is no label", "rehearsed": None} for rank in range(4)}
    found = table(several(2), reports(2, **same))
    one(found, "rehearsal", "fail", "n0, n1", "rank 0, 1, 2, 3 while at the end: there is no label")


def test_steps_that_are_not_finite_and_images_that_do_not_decode():
    one(table(several(1), reports(1, rank0={"not_finite": 2})), "rehearsal", "warn", "", "2 steps were not finite")
    found = table(several(2), reports(2, rank3={"replaced": 4}))
    one(found, "rehearsal", "warn", "n1", "4 images did not decode")


def test_memory_that_is_nearly_full():
    found = table(several(2), reports(2, rank2={"peak_bytes": 79 * GB}))
    assert "micro_batches" in one(found, "memory", "warn", "n1", "79.0 GB of 80.0 GB of a GPU").advice
    on_cpu = {"device_bytes": None, "peak_bytes": None, "resident_bytes": 60 * GB}
    both = reports(1, rank0=dict(on_cpu), rank1=dict(on_cpu))
    one(table(several(1), both), "memory", "warn", "n0", "122.0 GB of 128.0 GB of a host")
    on_gpu = reports(2, rank1={"resident_bytes": 120 * GB})
    one(
        table(several(2), on_gpu), "memory", "warn", "n0", "130.0 GB of 128.0 GB of a host"
    )  # checkpoints are copied there


def test_data_that_come_slower_than_they_are_trained_on():
    found = table(several(2), reports(2, rank3={"decode_images_s": 64.0}))
    one(found, "data rate", "warn", "n1", "64 images/s a process and a step takes 128 (0.50 x)")
    assert "2.8 h for 10,000 steps of 1.0 s" in found["total time"][0].figures  # data set the pace


def test_a_disk_without_room_for_the_checkpoints():
    small = {"target": TargetSeen("run/checkpoints", free=10 * GB, write_bytes_s=GB)}
    found = table(several(2, n1=small), reports(2))
    one(found, "checkpoint room", "fail", "n1", "4 at a time 16.0 GB", "has 10.0 GB free")
    resumed = {"target": TargetSeen("run/checkpoints", free=10 * GB, there=3, write_bytes_s=GB)}
    assert not bad(table(several(2, n1=resumed), reports(2)))  # three of the four are there


def test_a_run_that_goes_on_takes_the_time_that_is_left():
    found = table(several(1), reports(1, rank0={"done": 9000}))
    assert found["total time"][0].figures == "510.0 s for the last 1,000 of 10,000 steps of 510.0 ms"


def test_checkpoints_that_take_longer_than_the_steps_between_them():
    slow = {"target": TargetSeen("run/checkpoints", free=100 * GB, write_bytes_s=1e6)}
    found = table(several(1, n0=slow), reports(1))
    one(found, "checkpoint time", "warn", "", "about 33 min to write, 255.0 s between two")


@pytest.mark.parametrize(
    ("options", "count"), [({}, 4), ({"keep": 1}, 2), ({"keep_every": 1000}, 14), ({"every": 9000}, 3)]
)
def test_how_many_checkpoints_there_are_at_a_time(options, count):
    recipe = RECIPE.model_copy(update={"checkpoint": RECIPE.checkpoint.model_copy(update=options)})
    assert kept(recipe, 10_000) == count
