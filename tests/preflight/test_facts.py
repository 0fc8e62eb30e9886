"""What a host says of itself: a damaged or missing dataset, a target that cannot be written, other packages."""

from __future__ import annotations

import os
import shutil
import sys

import fsspec
import pytest

from medpretrain.preflight import facts
from medpretrain.preflight.data import look_at_dataset
from medpretrain.preflight.target import look_at_target, marker, sees_marker
from medpretrain.recipe_file import load_recipe
from tests.preflight.tiny import write_recipe


@pytest.fixture
def copy(small_dataset, tmp_path):
    return shutil.copytree(small_dataset, tmp_path / "copy")


@pytest.fixture
def recipe(tmp_path, small_dataset):
    """recipe(*overrides)"""
    file = write_recipe(tmp_path, small_dataset)
    return lambda *overrides: load_recipe(str(file), overrides)


def test_a_whole_dataset_is_verified_to_the_last_shard(small_dataset):
    found = look_at_dataset(str(small_dataset), host="a", shards=None)
    assert found.problem is None
    assert (found.samples, found.shards) == (66, len(list((small_dataset / "shards").glob("*.tar"))))
    assert len(found.verified) == found.shards
    assert found.bytes_s > 0


def test_hosts_choose_different_shards_and_a_host_always_the_same(small_dataset):
    def chosen(host):
        return look_at_dataset(str(small_dataset), host=host, shards=2).verified

    assert chosen("a") == chosen("a")
    assert len({chosen(f"node{number}") for number in range(8)}) > 3


def test_one_wrong_byte_in_a_shard_is_found_and_named(copy):
    shard = sorted((copy / "shards").glob("*.tar"))[3]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = look_at_dataset(str(copy), host="a", shards=None)
    assert found.problem == f"{shard} is damaged: its SHA-256 does not match"
    assert found.sha256 is not None


@pytest.mark.parametrize("shards", [0, None])
def test_a_missing_and_a_short_shard_are_found_whichever_are_verified(copy, shards):
    one, other = sorted((copy / "shards").glob("*.tar"))[:2]
    other.write_bytes(other.read_bytes()[:-1])
    size = other.stat().st_size
    assert look_at_dataset(str(copy), host="a", shards=shards).problem == f"{other} has {size} bytes, not {size + 1}"
    one.unlink()
    assert look_at_dataset(str(copy), host="a", shards=shards).problem == f"{one} is missing"


def test_a_changed_index_and_a_changed_description(copy):
    index = copy / "index.parquet"
    index.write_bytes(index.read_bytes() + b"\0")
    assert "index.parquet is damaged" in look_at_dataset(str(copy), host="a", shards=0).problem
    about = copy / "dataset.json"
    about.write_text(about.read_text().replace('"samples": 66', '"samples": 67'))
    found = look_at_dataset(str(copy), host="a", shards=0)
    assert "was changed since it was written" in found.problem
    assert found.sha256 is None


def test_no_dataset(tmp_path):
    assert "no prepared dataset" in look_at_dataset(str(tmp_path), host="a", shards=2).problem
    assert "no prepared dataset" in look_at_dataset(str(tmp_path / "nowhere"), host="a", shards=2).problem


def test_a_target_is_measured_and_nothing_is_made_or_left(recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = look_at_target(recipe(f"run.dir={tmp_path}/runs/one"))
    assert found.problem is None
    assert found.place == f"{tmp_path}/runs/one/checkpoints"
    assert found.write_bytes_s > 0
    assert 0 < found.free <= shutil.disk_usage(tmp_path).free * 1.1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_in_whose_place_is_a_file(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    found = look_at_target(recipe(f"run.dir={tmp_path}/run"))
    assert found.problem == f"{tmp_path}/run: it is not a folder"


def test_checkpoints_that_are_there_are_counted(recipe, tmp_path):
    for step in (1, 2):
        (tmp_path / "to" / f"step-0000000{step}").mkdir(parents=True)
    (tmp_path / "to" / "aside").mkdir()
    assert look_at_target(recipe(f"checkpoint.to={tmp_path}/to")).there == 2


def test_a_bucket_is_written_and_left_as_it_was(recipe):
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/run/step-00000001/manifest.json", b"{}")
    found = look_at_target(recipe("checkpoint.to=memory://bucket/run"))
    assert found.problem is None
    assert (found.free, found.there) == (None, 1)
    assert found.write_bytes_s > 0
    assert system.find("/bucket") == ["/bucket/run/step-00000001/manifest.json"]


def test_a_bucket_that_cannot_be_reached(recipe):
    found = look_at_target(recipe("checkpoint.to=nowhere://bucket/run"))
    assert "nowhere" in found.problem


def test_the_head_s_marker_is_seen_in_the_same_folder_only(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    one, other = recipe(f"run.dir={tmp_path}/a/run"), recipe(f"run.dir={tmp_path}/b/run")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with marker(one, ".mark"):
        assert sees_marker(one, ".mark")
        assert not sees_marker(other, ".mark")
    assert not list((tmp_path / "a").iterdir())


def test_versions_are_those_that_would_be_imported(tmp_path, monkeypatch):
    assert facts.versions()["webdataset"] is not None
    for name, version in (("timm", "0.0.1"), ("nvidia-dali-cuda999", "9.9")):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = facts.versions()
    assert (found["timm"], found["nvidia-dali"]) == ("0.0.1", "9.9-cuda999")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert facts.versions()["webdataset"] is None


def test_other_code_of_the_same_version_has_another_hash(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr("launchers.__file__", str(tmp_path / "__init__.py"))
    before = facts.code_sha256()
    assert facts.code_sha256() == before
    (tmp_path / "more.py").write_text("x = 1\n")
    after = facts.code_sha256()
    assert after != before
    (tmp_path / "more.py").rename(tmp_path / "other.py")
    assert facts.code_sha256() not in (before, after)


def test_a_password_of_the_tracker_is_no_fact(recipe):
    found = facts.look(recipe("tracking.uri='https://me:secret@server'"), "a", gpus=1, verify_shards=0)
    assert "secret" not in repr(found)


def test_a_file_system_that_does_not_answer_is_given_up_and_said(recipe, tmp_path, small_dataset):
    """As one whose server is away: whoever opens a file stands still."""
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    os.mkfifo(stuck / "dataset.json")
    signs = []
    paths = f"data.path=[{stuck},{small_dataset}]"
    found = facts.look(recipe(paths), "a", gpus=1, verify_shards=0, stuck_s=1.5, meanwhile=lambda: signs.append(1))
    assert found.datasets[0].problem == f"{stuck} gives no answer for 2 s: is the server of its file system away?"
    assert found.datasets[1].problem is None
    assert signs, "that it waits can be seen by others"


def test_a_gpu_that_cannot_be_looked_at_is_a_finding(monkeypatch, recipe):
    def broken(number):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", broken)
    found = facts.look(recipe("device=auto"), "a", gpus=2, verify_shards=0)
    assert (found.gpus, found.gpu_problem) == ((), "CUDA error: uncorrectable ECC error encountered")


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [
        ("0::/system.slice/slurmstepd.scope/job_7/step_0", "system.slice/slurmstepd.scope/job_7", "memory.max"),
        ("4:memory:/slurm/uid_0/job_7", "memory/slurm/uid_0/job_7", "memory.limit_in_bytes"),
    ],
)
def test_the_memory_of_a_job_is_less_than_the_hosts(monkeypatch, tmp_path, line, folder, name):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / name).write_text("123456789\n")
    (tmp_path / "cgroup").write_text(f"1:cpu:/x\n{line}\n")
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    monkeypatch.setattr(facts, "_OWN_CGROUPS", tmp_path / "cgroup")
    assert facts._memory() == 123456789
