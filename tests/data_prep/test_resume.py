"""A run that is killed, split into parts or out of space: nothing half is seen, and it ends in the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError, WorkFailed
from data_prep.images import Images, prepare
from data_prep.options import Options, Progress, Running
from data_prep.prepare import Summary, Unfinished
from data_prep.prepare import prepare as prepare_kind
from data_prep.shard import ShardWriter
from data_prep.staging import Staging
from data_prep.verify import verify

Draw = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def killed_commit(monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Die at a rename of the commit, counted from 0."""
    left = renames
    rename, commit = Path.rename, Staging.commit
    committing = False

    def counted(self: Path, target: Path) -> Path:
        nonlocal left
        left -= committing
        if left < 0:
            raise Killed
        return rename(self, target)

    def flagged(self: Staging) -> None:
        nonlocal committing
        committing = True
        commit(self)
        committing = False

    def as_the_kernel(self: Staging) -> None:
        while self._locks:
            os.close(self._locks.pop())

    monkeypatch.setattr(Path, "rename", counted)
    monkeypatch.setattr(Staging, "commit", flagged)
    monkeypatch.setattr(Staging, "_release", as_the_kernel)


@pytest.mark.parametrize("renames", range(5))
def test_a_commit_killed_at_any_rename_is_finished_by_the_same_command(
    tree: Path, tmp_path: Path, renames: int
) -> None:
    out = tmp_path / "out"
    prepare(tree, out)
    old = contents(out)
    prepare(tree, tmp_path / "whole", seed=7)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        killed_commit(patch, renames)
        prepare(tree, out, seed=7, overwrite=True)
    assert (tmp_path / ".out.partial" / "plan.json").exists() == (renames < 4)  # a commit renames four times
    if renames < 4:
        with pytest.raises(UserError, match=r"another plan is there|prepared dataset already"):
            prepare(tree, out, seed=8)
        assert contents(out) == old  # what was there is there again until the new one is whole
    with contextlib.suppress(UserError):  # where the last rename was done
        prepare(tree, out, seed=7, overwrite=renames < 4)
    assert contents(out) == contents(tmp_path / "whole")
    assert contents(tmp_path / "out.private") == contents(tmp_path / "whole.private")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private", "tree", "whole", "whole.private"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tree: Path, tmp_path: Path, draw: Draw, rng: random.Random, workers: int
) -> None:
    for number in range(150):
        (tree / "cat" / f"{number}_more.bmp").write_bytes(draw(number, "BMP", mode="RGB", size=(500, 300)))
    script = (
        "import sys; from pathlib import Path; from data_prep.images import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]), shard_size=20)\n"
    )
    (tmp_path / "run.py").write_text(script)
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "run.py"), str(tree), str(out), str(workers)]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    partial = tmp_path / ".out.partial"
    while process.poll() is None and not list(partial.glob("records/*.parquet")):
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    with pytest.raises(UserError, match="another run is writing"):
        prepare(tree, out, shard_size=20)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(UserError, match=r"another plan is there .resize was null and is now 8"):
        prepare(tree, out, shard_size=20, resize=8)
    first: list[Progress] = []
    prepare(tree, out, shard_size=20, on_progress=first.append)
    assert first[0].done >= 20  # it did not begin anew
    prepare(tree, tmp_path / "whole", shard_size=20)
    assert contents(out) == contents(tmp_path / "whole")
    assert contents(tmp_path / "out.private") == contents(tmp_path / "whole.private")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_an_interrupt_leaves_nothing_half_and_can_be_forgotten(tree: Path, tmp_path: Path) -> None:
    def interrupt(now: Progress) -> None:
        if now.done >= 8:
            raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            prepare(tree, tmp_path / "out", workers=workers, shard_size=4, on_progress=interrupt)
        assert sorted(os.listdir(tmp_path)) == [".out.partial", "tree"]
    prepare(tree, tmp_path / "out", seed=3, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private", "tree"]


def test_parts_in_any_order_give_what_one_run_gives(tree: Path, tmp_path: Path, rng: random.Random) -> None:
    kind, options = Images(tree, patient_pattern=r"(\d+)_"), Options({"train": 0.6, "val": 0.4}, 1, 4)
    whole = prepare_kind(kind, tmp_path / "whole", options, Running())
    assert isinstance(whole, Summary)
    parts = [(i, 3) for i in (1, 2, 3)]
    rng.shuffle(parts)
    for part in parts[:-1]:
        result = prepare_kind(kind, tmp_path / "out", options, Running(part=part))
        assert isinstance(result, Unfinished)
        assert result.left
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"another plan is there .seed was 1 and is now 2"):
        prepare_kind(kind, tmp_path / "out", Options({"train": 0.6, "val": 0.4}, 2, 4), Running(part=(3, 3)))
    assert isinstance(prepare_kind(kind, tmp_path / "out", options, Running(part=parts[-1])), Summary)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not verify(tmp_path / "out")


def test_what_is_added_becomes_new_shards_and_the_old_ones_stay(tree: Path, tmp_path: Path, draw: Draw) -> None:
    key = tmp_path / "key"
    key.write_bytes(random.Random(0).randbytes(40))
    key.chmod(0o600)
    how = {"patient_pattern": r"(\d+)_", "split": {"train": 0.6, "val": 0.4}, "shard_size": 5, "key_file": key}
    out = tmp_path / "out"
    prepare(tree, out, **how)  # type: ignore[arg-type]
    before = contents(out)
    links = pq.read_table(tmp_path / "out.private" / "sources.parquet").to_pylist()
    with pytest.raises(UserError, match=r"can be used .no new ones"):
        prepare(tree, out, append=True, **how)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="made with other options: split"):
        prepare(tree, out, append=True, **{**how, "split": None})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another --seed"):
        prepare(tree, out, append=True, seed=4, **how)  # type: ignore[arg-type]
    (tree / "bird").mkdir()
    for number in range(9):
        (tree / "bird" / f"{100 + number % 3}_new{number}.png").write_bytes(draw(500 + number))
    (tree / "bird" / "108_broken.png").write_bytes(b"")
    summary = prepare(tree, out, append=True, workers=2, **how)  # type: ignore[arg-type]
    now = contents(out)
    assert summary.info.samples == 33
    assert summary.info.sources == 34
    assert summary.info.quarantined == 1
    assert {name for name in before if now[name] != before[name]} == {
        "dataset.json",
        "index.parquet",
        "quarantine.parquet",
    }
    assert summary.info.labels["class"].names == ["cat", "dog", "bird"]  # old ids stay
    assert not verify(out)
    rows = pq.read_table(out / "index.parquet").to_pylist()
    homes: dict[str, set[str]] = {}
    for row in rows:
        homes.setdefault(row["patient"], set()).add(row["split"])
    assert len(homes) == 10
    assert all(len(splits) == 1 for splits in homes.values())
    after = pq.read_table(tmp_path / "out.private" / "sources.parquet").to_pylist()
    assert after[: len(links)] == links
    assert len({row["number"] for row in after}) == len(after) == 34


def test_without_a_key_patients_cannot_be_added_to(tree: Path, tmp_path: Path, draw: Draw) -> None:
    prepare(tree, tmp_path / "out", patient_pattern=r"(\d+)_")
    (tree / "cat" / "300_left.png").write_bytes(draw(500))
    with pytest.raises(UserError, match="needs the --key-file"):
        prepare(tree, tmp_path / "out", patient_pattern=r"(\d+)_", append=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private", "tree"]


def test_a_run_without_space_says_so_and_goes_on_later(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from data_prep.shard import ShardWriter

    close, closed = ShardWriter.close, 0

    def full(self: ShardWriter) -> object:
        nonlocal closed
        closed += 1
        if closed == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", full)
    with pytest.raises(WorkFailed, match=r"No space left on device .*mounted at /.*what is done is kept: make room"):
        prepare(tree, tmp_path / "out", shard_size=6)
    assert not (tmp_path / "out").exists()
    shards = list((tmp_path / ".out.partial").rglob("*.tar"))
    assert len(shards) == 2
    assert all(shard.parent.name == "shards" for shard in shards)
    prepare(tree, tmp_path / "out", shard_size=6)
    prepare(tree, tmp_path / "whole", shard_size=6)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
