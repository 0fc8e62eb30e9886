"""A job array: processes that start at the same moment, are killed, given again and too late."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.images import Images, prepare
from data_prep.options import Options, Running
from data_prep.prepare import Summary, Unfinished
from data_prep.prepare import prepare as prepare_kind
from data_prep.staging import Staging

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, time
from pathlib import Path
from data_prep.images import Images
from data_prep.options import Options, Running
from data_prep.prepare import prepare, Unfinished
while not Path(sys.argv[5]).exists():
    time.sleep(0.001)
part = int(sys.argv[3]), int(sys.argv[4])
result = prepare(Images(Path(sys.argv[1])), sys.argv[2], Options(shard_size=1), Running(part=part))
print("left" if isinstance(result, Unfinished) else "finished")
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_parts_that_race_give_what_one_run_gives(tree: Path, tmp_path: Path, rng: random.Random) -> None:
    script, go = tmp_path / "run.py", tmp_path / "go"
    script.write_text(SCRIPT)

    def start(part: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tree), str(tmp_path / "out"), str(part), "3", str(go)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)

    parts = {part: start(part) for part in (1, 2, 3)}
    time.sleep(2)  # all have imported and wait
    go.touch()
    killed = rng.choice([1, 2, 3])
    while parts[killed].poll() is None and not list((tmp_path / ".out.partial").glob("records/*.parquet")):
        time.sleep(0.002)
    os.killpg(parts[killed].pid, signal.SIGKILL)
    said = {part: process.communicate(timeout=60) for part, process in parts.items()}
    assert not [text for part, text in said.items() if part != killed and text[0] != "left\n"], said
    assert not (tmp_path / "out").exists()
    again = start(killed)
    assert again.communicate(timeout=60)[0] == "finished\n"
    prepare(tree, tmp_path / "whole", shard_size=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(tmp_path / "out.private") == contents(tmp_path / "whole.private")
    assert sorted(os.listdir(tmp_path)) == ["go", "out", "out.private", "run.py", "tree", "whole", "whole.private"]


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("moment", [0, 1])
def test_another_part_comes_or_goes_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, leaves: bool
) -> None:
    """Right before the first or the second look that a starting part takes at the hidden folder, another part makes it
    or removes it."""
    other = contextlib.ExitStack()
    enter = Staging(tmp_path / "out", None, False, False).enter((2, 4))
    if leaves:
        other.enter_context(enter)
    looks, happening = 0, False

    def watched(look: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def before_the_look(path: Path) -> Any:
            nonlocal looks, happening
            if ".out.partial" in str(path) and not happening:
                looks += 1
                if looks == moment + 1:
                    happening = True
                    if leaves:
                        other.close()
                    else:
                        other.enter_context(enter)
                    happening = False
            return look(path)

        return before_the_look

    for look in ("is_file", "is_dir", "exists", "iterdir"):
        monkeypatch.setattr(Path, look, watched(getattr(Path, look)))
    with other, Staging(tmp_path / "out", None, False, False).enter((1, 4)):
        pass
    assert looks > moment
    monkeypatch.undo()
    assert not os.listdir(tmp_path)


def test_parts_may_come_and_go_at_any_moment(tmp_path: Path) -> None:
    """Each makes the hidden folder or finds it, and the last one out removes it."""

    def come_and_go(part: int) -> None:
        for _ in range(300):
            with Staging(tmp_path / "out", None, False, False).enter((part, 4)):
                pass

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go, part) for part in (1, 2, 3, 4)]:
            done.result()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_part_that_comes_late_changes_nothing(tree: Path, tmp_path: Path, overwrite: bool) -> None:
    def run(part: int, shard_size: int = 12) -> Summary | Unfinished:
        running = Running(part=(part, 4), overwrite=overwrite)
        return prepare_kind(Images(tree), tmp_path / "out", Options(shard_size=shard_size), running)

    assert isinstance(run(1), Unfinished)
    assert isinstance(run(2), Summary)
    before = contents(tmp_path / "out")
    for part in (3, 1):  # one has no shards, one is given again
        if overwrite:
            with pytest.raises(UserError, match="out was made by this very command; to make it anew in parts, remove"):
                run(part)
        else:
            result = run(part)
            assert isinstance(result, Summary)
            assert result.info.samples == 24
    assert contents(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private", "tree"]
    if overwrite:
        assert isinstance(run(1, 6), Unfinished)
    else:
        with pytest.raises(UserError, match="prepared dataset already"):
            run(1, 6)


def test_the_plan_of_parts_at_work_is_not_overwritten(tree: Path, tmp_path: Path) -> None:
    def run(part: int, shard_size: int) -> Summary | Unfinished:
        running = Running(part=(part, 3), overwrite=True)
        return prepare_kind(Images(tree), tmp_path / "out", Options(shard_size=shard_size), running)

    run(1, 6)
    with (
        Staging(tmp_path / "out", None, False, False).enter((2, 3)),
        pytest.raises(UserError, match="other parts are at work with another plan"),
    ):
        run(1, 4)
    assert isinstance(run(1, 4), Unfinished)


def test_the_same_part_twice_is_refused(tree: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "out", None, False, False).enter((1, 3)):
        with pytest.raises(UserError, match=r"another run is writing part 1/3 of "):
            prepare_kind(Images(tree), tmp_path / "out", Options(), Running(part=(1, 3)))
        with pytest.raises(UserError, match="another run is writing"):
            prepare(tree, tmp_path / "out")
    assert os.listdir(tmp_path) == ["tree"]


def test_the_plan_holds_each_shard_its_own_patients_alone(tree: Path, tmp_path: Path) -> None:
    for number in range(400):
        (tree / "cat" / f"{1000 + number}_left.png").write_bytes(b"")
    kind = Images(tree, patient_pattern=r"(\d+)_")
    assert isinstance(prepare_kind(kind, tmp_path / "out", Options(shard_size=4), Running(part=(200, 200))), Unfinished)
    group = pq.ParquetFile(tmp_path / ".out.partial" / "plan.parquet").metadata.row_group(0)
    assert max(group.column(place).total_uncompressed_size for place in range(group.num_columns)) < 500  # bytes
