"""A dataset in an object store, behind a real S3 API on loopback: a local run's bytes, whatever goes wrong between."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import pytest

from data_prep.errors import UserError, WorkFailed
from data_prep.images import prepare
from data_prep.options import Progress
from data_prep.staging import Staging
from data_prep.store import UrlStore
from tests.s3 import Server, serving

Draw = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]
HOW = {"split": {"train": 0.6, "val": 0.4}, "shard_size": 4}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    name = f"b{abs(hash(request.node.name)):x}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


def objects(bucket: str, prefix: str = "out/") -> dict[str, bytes]:
    """Every object below a prefix."""
    found = boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=prefix)
    return {entry.key.removeprefix(prefix): entry.get()["Body"].read() for entry in found}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def killed_at(patch: pytest.MonkeyPatch, step: int, *, commit: bool) -> None:
    """Die at a change to the store or a rename, counted from 0; of the commit only, or of all the run."""
    left, counting = step, not commit
    real = {(owner, name): getattr(owner, name) for owner, name in ((UrlStore, "add"), (UrlStore, "remove"))}
    real[Path, "rename"] = Path.rename
    whole = Staging.commit

    def counted(key: tuple[type, str]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= counting
            if left < 0:
                raise Killed
            return real[key](*arguments)

        return call

    def flagged(self: Staging) -> None:
        nonlocal counting
        counting = True
        whole(self)
        counting = not commit

    def as_the_kernel(self: Staging) -> None:
        while self._locks:
            os.close(self._locks.pop())

    for owner, name in real:
        patch.setattr(owner, name, counted((owner, name)))
    patch.setattr(Staging, "commit", flagged)
    patch.setattr(Staging, "_release", as_the_kernel)


def run_killed(step: int, *, commit: bool, **how: object) -> bool:
    """Whether it was killed before its end."""
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, step, commit=commit)
        try:
            prepare(**how)  # type: ignore[arg-type]
        except Killed:
            return True
        return False


def test_the_objects_are_the_files_of_a_local_run(tree: Path, tmp_path: Path, bucket: str) -> None:
    url = f"s3://{bucket}/out/"
    prepare(tree, tmp_path / "local", **HOW)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give --private DIR"):
        prepare(tree, url)
    summary = prepare(tree, url, private=tmp_path / "secret", workers=2, **HOW)  # type: ignore[arg-type]
    assert objects(bucket) == contents(tmp_path / "local")
    assert contents(tmp_path / "secret") == contents(tmp_path / "local.private")
    assert summary.out == url.rstrip("/")
    with pytest.raises(UserError, match="prepared dataset already; --overwrite replaces it"):
        prepare(tree, url, private=tmp_path / "secret")
    assert sorted(os.listdir(tmp_path)) == ["local", "local.private", "secret", "tree"]
    assert not any(b"12_left" in data or str(tmp_path).encode() in data for data in objects(bucket).values())


def test_a_process_that_is_killed_goes_on(tree: Path, tmp_path: Path, bucket: str, rng: random.Random) -> None:
    (tmp_path / "run.py").write_text(
        "import sys; from pathlib import Path; from data_prep.images import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(Path(sys.argv[1]), sys.argv[2], private=Path(sys.argv[3]), shard_size=2)\n"
    )
    private = tmp_path / "secret"
    command = [sys.executable, str(tmp_path / "run.py"), str(tree), f"s3://{bucket}/out", str(private)]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.poll() is None and not list((tmp_path / ".secret.partial").glob("records/*.parquet")):
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first: list[Progress] = []
    prepare(tree, f"s3://{bucket}/out", private=private, shard_size=2, on_progress=first.append)
    prepare(tree, tmp_path / "local", shard_size=2)
    assert first[0].done >= 2  # it did not begin anew
    assert objects(bucket) == contents(tmp_path / "local")


def test_a_commit_killed_at_any_step_is_never_half_a_dataset(tree: Path, tmp_path: Path, bucket: str) -> None:
    url, private = f"s3://{bucket}/out", tmp_path / "secret"
    prepare(tree, tmp_path / "local", seed=7)
    wanted = contents(tmp_path / "local")
    killed = 0
    while True:
        same = {"source": tree, "out": url, "private": private, "seed": 7, "overwrite": killed != 2}
        if same["overwrite"]:
            prepare(tree, url, private=private, overwrite=True, shard_size=12)  # two shards, of which one is to go
        if not run_killed(killed, commit=True, **same):
            break
        there = objects(bucket)
        if "dataset.json" in there:  # it says the truth at any moment
            assert there["dataset.json"] == wanted["dataset.json"]
            assert {name: there[name] for name in wanted} == wanted
        prepare(**same)  # type: ignore[arg-type]
        assert objects(bucket) == wanted
        assert contents(private) == contents(tmp_path / "local.private")
        assert sorted(os.listdir(tmp_path)) == ["local", "local.private", "secret", "tree"]
        boto3.resource("s3").Bucket(bucket).objects.all().delete()
        for file in private.iterdir():
            file.unlink()
        private.rmdir()
        killed += 1
    assert killed >= 6  # two renames, remove, three uploads, remove twice


def test_what_is_overwritten_is_no_dataset_from_the_first_change_on(tree: Path, tmp_path: Path, bucket: str) -> None:
    url, private = f"s3://{bucket}/out", tmp_path / "secret"
    prepare(tree, url, private=private)
    old = objects(bucket)
    same = {"source": tree, "out": url, "private": private, "seed": 7, "overwrite": True, **HOW}
    assert run_killed(4, commit=False, **same)
    there = objects(bucket)
    assert "dataset.json" not in there
    assert there != {name: data for name, data in old.items() if name != "dataset.json"}
    with pytest.raises(UserError, match="holds the link table of an earlier run"):
        prepare(tree, url, private=private, seed=8)
    with pytest.raises(UserError, match=r"--append: there is no dataset at"):
        prepare(tree, url, private=private, append=True)
    prepare(**same)  # type: ignore[arg-type]
    prepare(tree, tmp_path / "local", seed=7, **HOW)  # type: ignore[arg-type]
    assert objects(bucket) == contents(tmp_path / "local")


def test_what_is_added_is_what_a_local_run_adds_killed_or_not(
    tree: Path, tmp_path: Path, bucket: str, draw: Draw
) -> None:
    url, private = f"s3://{bucket}/out", tmp_path / "secret"
    prepare(tree, url, private=private, shard_size=6)
    prepare(tree, tmp_path / "local", shard_size=6)
    for number in range(9):
        (tree / "cat" / f"{100 + number % 3}_new{number}.png").write_bytes(draw(500 + number))
    same = {"source": tree, "out": url, "private": private, "shard_size": 6, "append": True}
    before = objects(bucket)
    assert run_killed(4, commit=False, **same)  # among the shards
    assert {name: data for name, data in objects(bucket).items() if name in before} == before
    step = 0
    while run_killed(step, commit=True, **same):
        step += 3
    prepare(tree, tmp_path / "local", shard_size=6, append=True)
    assert step >= 6
    assert objects(bucket) == contents(tmp_path / "local")
    assert contents(private) == contents(tmp_path / "local.private")


def test_a_killed_append_may_be_given_up(tree: Path, tmp_path: Path, bucket: str, draw: Draw) -> None:
    url, private = f"s3://{bucket}/out", tmp_path / "secret"
    prepare(tree, url, private=private, shard_size=6)
    (tree / "cat" / "new.png").write_bytes(draw(500))
    same = {"source": tree, "out": url, "private": private, "shard_size": 6, "append": True}
    assert run_killed(5, commit=False, **same)
    (tree / "cat" / "new2.png").write_bytes(draw(501))
    with pytest.raises(UserError, match=r"another plan is there .patient_pattern was.*or remove .*\.secret\.partial"):
        prepare(**{**same, "patient_pattern": r"(\d+)_"})  # type: ignore[arg-type]
    for file in sorted((tmp_path / ".secret.partial").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    summary = prepare(**same)  # type: ignore[arg-type]
    assert summary.info.samples == 26


def test_what_is_not_ours_is_never_touched(tree: Path, tmp_path: Path, bucket: str) -> None:
    url, private = f"s3://{bucket}/out", tmp_path / "secret"
    client = boto3.client("s3")
    for name in ("notes.txt", "shards/notes.txt", "shards/train-00000.tar", "index.parquet"):
        client.put_object(Bucket=bucket, Key=f"out/{name}", Body=b"mine")
        for overwrite in (False, name != "notes.txt" and name != "shards/notes.txt"):
            if not overwrite:
                with pytest.raises(UserError, match=f"will not be overwritten: it is no dataset and holds {name}"):
                    prepare(tree, url, private=private)
        with pytest.raises(UserError, match="no dataset at"):
            prepare(tree, f"s3://{bucket}/elsewhere", private=private, append=True)
        client.delete_object(Bucket=bucket, Key=f"out/{name}")
    client.put_object(Bucket=bucket, Key="out2/mine", Body=b"mine")  # a name that only begins alike

    def disturb(now: Progress) -> None:
        client.put_object(Bucket=bucket, Key="out/shards/mine.txt", Body=b"mine")

    prepare(tree, url, private=private, on_progress=disturb)
    assert objects(bucket, "out2/") == {"mine": b"mine"}
    assert objects(bucket)["shards/mine.txt"] == b"mine"
    with pytest.raises(UserError, match=r"also holds shards/mine\.txt"):
        prepare(tree, url, private=private, overwrite=True)


def test_a_server_that_goes_away_ends_the_run_in_one_line_and_it_goes_on(
    tree: Path, tmp_path: Path, bucket: str, server: Server
) -> None:
    how = ["images", str(tree), f"s3://{bucket}/out", "--private", str(tmp_path / "secret"), "--shard-size", "2"]

    def away(now: Progress) -> None:
        if now.done >= 8:
            server.stop()

    try:
        with pytest.raises(WorkFailed, match=r"^s3://.*Could not connect to the endpoint") as caught:
            prepare(
                tree,
                f"s3://{bucket}/out",
                private=tmp_path / "secret",
                shard_size=2,
                on_progress=away,
                duplicates="off",
            )
        assert "\n" not in str(caught.value)
        assert "secret-of-key" not in str(caught.value)
        command = [sys.executable, "-m", "medpretrain.cli", "prep", *how, "--duplicates", "off"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr
        assert "Could not connect" in done.stderr
    finally:
        server.start()
    fsspec.core.url_to_fs("s3://")[0].clear_instance_cache()
    prepare(tree, f"s3://{bucket}/out", private=tmp_path / "secret", shard_size=2, duplicates="off")
    prepare(tree, tmp_path / "local", shard_size=2, duplicates="off")
    assert objects(bucket) == contents(tmp_path / "local")


def test_what_cannot_be_opened_says_why(
    tree: Path, tmp_path: Path, bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "secret"
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: The specified bucket does not exist$"):
        prepare(tree, "s3://no-such-bucket/x", private=private)
    with pytest.raises(UserError, match=r"^nosuch://a/b cannot be opened: "):
        prepare(tree, "nosuch://a/b", private=private)
    with pytest.raises(UserError, match="password must not stand in the URL") as caught:
        prepare(tree, "ftp://me:hidden@host/x", private=private)
    assert "hidden" not in str(caught.value)
    with pytest.raises(UserError, match="give a local folder as a path"):
        prepare(tree, f"file://{tmp_path}/x", private=private)
    with pytest.raises(UserError, match="not as a Path, which drops a slash"):
        prepare(tree, Path("s3://a/b"), private=private)
    assert os.listdir(tmp_path) == ["tree"]

    def denied(self: object, *_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.get_filesystem_class("s3"), "find", denied)
        with pytest.raises(UserError, match=rf"^s3://{bucket}/out: Access Denied$"):
            prepare(tree, f"s3://{bucket}/out", private=private)
    with monkeypatch.context() as patch:
        patch.setattr(fsspec.core.url_to_fs(f"s3://{bucket}")[0], "put_file", denied)
        with pytest.raises(WorkFailed, match=rf"^s3://{bucket}/out: Access Denied$"):  # kept: a token may expire
            prepare(tree, f"s3://{bucket}/out", private=private)
    assert (tmp_path / ".secret.partial" / "plan.json").exists()


def test_images_that_cannot_be_a_dataset_leave_nothing(tree: Path, tmp_path: Path, bucket: str, draw: Draw) -> None:
    (tree / "cat" / "deep.png").write_bytes(draw(1, "PNG", mode="I;16"))
    with pytest.raises(UserError, match="are mixed"):
        prepare(tree, f"s3://{bucket}/out", private=tmp_path / "secret", shard_size=3)
    assert not objects(bucket)
    assert os.listdir(tmp_path) == ["tree"]


def test_the_plan_of_one_url_is_not_used_for_another(tree: Path, tmp_path: Path, bucket: str) -> None:
    private = tmp_path / "secret"
    assert run_killed(2, commit=True, source=tree, out=f"s3://{bucket}/out", private=private)
    with pytest.raises(UserError, match="belongs to a run for another OUT"):
        prepare(tree, f"s3://{bucket}/out2", private=private)
    assert not objects(bucket, "out2/")
    prepare(tree, f"s3://{bucket}/out", private=private)
