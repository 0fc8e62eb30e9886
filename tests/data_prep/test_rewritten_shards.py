"""Duplicates are taken out of shards that are written already: killed at any step of it, the bytes are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import deduplicate, finish
from data_prep.images import prepare
from data_prep.plan import PlanFile
from data_prep.records import Records
from data_prep.staging import Staging
from data_prep.store import FolderStore
from data_prep.verify import verify


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; but for the audit log, which tells the time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "audit.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def drop_some(plan: PlanFile, records: Records, *rest: object) -> dict[str, object]:
    """One image of the first shard, all of the second."""
    keys = [key for number in (0, 1) for key in records.load(number).rows.column("key").to_pylist()]
    return {"found": {}, "warnings": [], "drop": [keys[1], *keys[4:8]]}


def run_killed(step: int, tree: Path, out: Path, **how: object) -> bool:
    """Die at a step of taking duplicates out, counted from 0; False where there are no so many steps."""
    left, finishing = step, False

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= finishing
            if left < 0:
                raise Killed
            return real(*arguments)

        return call

    def flagged(*arguments: object, real: Callable[..., object] = finish.deduplicated) -> object:
        nonlocal finishing
        finishing = True
        result = real(*arguments)
        finishing = False
        return result

    def as_the_kernel(self: Staging) -> None:
        while self._locks:
            os.close(self._locks.pop())

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((FolderStore, "add"), (FolderStore, "remove"), (Records, "save")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(finish, "deduplicated", flagged)
        patch.setattr(Staging, "_release", as_the_kernel)
        try:
            prepare(tree, out, **how)  # type: ignore[arg-type]
        except Killed:
            return True
        return False


def test_a_run_killed_while_duplicates_are_taken_out_goes_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deduplicate, "_search", drop_some)
    prepare(tree, tmp_path / "whole", shard_size=4, drop_duplicates="exact")
    assert not verify(tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "shards").glob("*.tar"))) == 5
    out, step = tmp_path / "out", 0
    how = {"shard_size": 4, "drop_duplicates": "exact", "overwrite": True}
    while run_killed(step, tree, out, **how):
        prepare(tree, out, **how)  # type: ignore[arg-type]
        assert contents(out) == contents(tmp_path / "whole")
        assert contents(tmp_path / "out.private") == contents(tmp_path / "whole.private")
        step += 1
    assert step == 6  # index, tar and record of one; tar, index and record of the other
