"""Whether a dataset can be read on this host, and is the one that was written."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import INDEX, SHARDS, read_info
from data_prep.errors import UserError, WorkFailed
from data_prep.store import FolderStore
from data_prep.verify_shard import Problem, open_whole


@dataclass(frozen=True)
class DatasetSeen:
    """A dataset as this host sees it.

    Attributes:
        sha256: of dataset.json, which has the hashes of all else; None where it cannot be read.
        samples, shards: that it has.
        verified: names of the shards whose SHA-256 was computed and is right.
        bytes_s: at which they were read, without what the host may have had in memory already being told apart.
        problem: the first thing that is wrong, None where nothing is.
    """

    path: str
    sha256: str | None = None
    samples: int = 0
    shards: int = 0
    verified: tuple[str, ...] = ()
    bytes_s: float | None = None
    problem: str | None = None


def look_at_dataset(
    path: str, *, host: str, shards: int | None, on_file: Callable[[str], None] = lambda name: None
) -> DatasetSeen:
    """Read dataset.json and index.parquet with their hashes, the sizes of all shards, and the hashes of some.

    Args:
        host: another name chooses other shards, so that many hosts together see more of them.
        shards: how many; None: all.
        on_file: told of each file that is looked at.
    """
    folder = Path(path)
    try:
        info, sha256 = read_info(folder)
    except (UserError, OSError) as error:
        return DatasetSeen(path, problem=_said(error))
    found = DatasetSeen(path, sha256, info.samples, len(info.shards))
    store = FolderStore(folder, folder)
    files: list[tuple[str, str, int | None]] = [(INDEX, info.index_sha256, None)]
    try:
        for shard in info.shards:
            on_file(shard.name)
            size = store.size(f"{SHARDS}/{shard.name}")
            if size != shard.bytes:
                what = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                return _with(found, problem=f"{folder / SHARDS / shard.name} {what}")
    except OSError as error:
        return _with(found, problem=_said(error))
    count = len(info.shards) if shards is None else min(shards, len(info.shards))
    chosen = random.Random(f"{sha256} {host}").sample(info.shards, count)
    files += [(f"{SHARDS}/{shard.name}", shard.sha256, shard.bytes) for shard in chosen]
    began = time.perf_counter()
    for name, its_sha256, its_bytes in files:
        on_file(name)
        with contextlib.ExitStack() as stack:
            try:
                opened = open_whole(stack, store, name, its_sha256, its_bytes)
            except WorkFailed as error:
                return _with(found, problem=_said(error))
        if isinstance(opened, Problem):
            return _with(found, problem=f"{folder / opened.file} {opened.message}")
    took = time.perf_counter() - began
    read = store.size(INDEX) or 0
    return DatasetSeen(
        path,
        sha256,
        info.samples,
        len(info.shards),
        tuple(sorted(shard.name for shard in chosen)),
        (read + sum(shard.bytes for shard in chosen)) / max(took, 1e-9),
    )


def _with(found: DatasetSeen, problem: str) -> DatasetSeen:
    return DatasetSeen(found.path, found.sha256, found.samples, found.shards, problem=problem)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())
