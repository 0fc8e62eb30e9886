"""Prove that a dataset is what was written and what it says of itself, with memory that hardly grows with it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep import verify_readers
from data_prep.dataset import INDEX, INFO, QUARANTINE, SHARDS
from data_prep.dataset_info import DatasetInfo, parse_info
from data_prep.errors import UserError
from data_prep.options import Progress
from data_prep.pool import open_engine
from data_prep.staging import stray_files
from data_prep.store import FolderStore, Store, open_store
from data_prep.verify_index import Index, quarantine_problems
from data_prep.verify_readers import READERS
from data_prep.verify_shard import Check, Found, Problem, Work, check_shard, open_whole

_QUICK = "not tried (quick): decoding the images, reading the shards with webdataset and DALI"


class Findings(list[Problem]):
    """What is wrong with a dataset, in the order of its files; empty where nothing is.

    Attributes:
        notes: what was not tried, and why.
        info: the content of dataset.json; None where it is missing or damaged.
        sha256: that of dataset.json, which is the identity of the dataset.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.info: DatasetInfo | None = None
        self.sha256: str | None = None


def verify(
    path: str | Path,
    *,
    quick: bool = False,
    workers: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Findings:
    """Compare a dataset with its own hashes and counts, its shards with its index, its images with their fingerprints.

    Every byte of every file is read; every image is decoded; webdataset and DALI read every shard, where they are
    installed; no patient, study, series or image may be in two splits.

    What cannot be found is a change that someone made everywhere at once, with new hashes, to what is said nowhere
    else: a patient, study, series or instance renamed in index and record alike (into no other split), so too a label;
    `about`; an image replaced together with its fingerprint and size; some bits of the perceptual hash of a JPEG that
    was encoded here, and its absence; a number, detail, patient or instance in the quarantine; statistics, options,
    claims and where labels come from in dataset.json; bytes of a JPEG that no pixel depends on. Compare `sha256` with
    one kept elsewhere for that.

    Args:
        path: the dataset: a folder, or an fsspec URL, of which `workers` shards at a time are on this machine.
        quick: without decoding and the other readers.
        workers: processes.
        on_progress: called after each shard.

    Raises:
        UserError: there is no dataset at `path`.
        WorkFailed: a worker was killed.
    """
    store = open_store(path)
    names = store.names()
    findings = Findings()
    if INFO not in names:
        if not any(name.startswith(f"{SHARDS}/") for name in names):
            raise UserError(f"{path} is no prepared dataset: it has no {INFO}")
        findings.append(Problem(INFO, "is missing"))
        return findings
    with store.local(INFO) as file:
        raw = file.read_bytes()
    try:
        info = parse_info(raw, INFO)
    except UserError as error:
        # Its hashes cannot be trusted, so nothing else can be judged by them.
        findings.append(Problem(INFO, str(error)))
        return findings
    findings.info, findings.sha256 = info, hashlib.sha256(raw).hexdigest()
    if not _proper_shards(info):
        findings.append(Problem(INFO, "its list of shards is not SPLIT-NUMBER.tar in order"))
        return findings
    strays = sorted([*stray_files(names, info), *_stray_folders(store, names)])
    findings += [Problem(name, "does not belong to the dataset") for name in strays]
    readers = tuple(reader for reader in READERS if not quick and verify_readers.installed(reader))
    findings.notes += [_QUICK] if quick else []
    findings.notes += [f"not tried: {READERS[r]} is not installed" for r in READERS if not quick and r not in readers]
    check = Check(
        store,
        {name: list(vocabulary.names) for name, vocabulary in info.labels.items()},
        bool(info.options.get("trust_images")),
        not quick,
        readers,
    )
    with contextlib.ExitStack() as stack:
        opened = open_whole(stack, store, INDEX, info.index_sha256)
        quarantine = open_whole(stack, store, QUARANTINE, info.quarantine_sha256)
        index = None if isinstance(opened, Problem) else Index(opened, info)
        found = _check_shards(check, info, index, workers, on_progress)
        for result in (opened, quarantine):
            if isinstance(result, Problem):
                findings.append(result)
        if index is not None:
            findings += index.problems
        for shard in sorted(found):
            findings += shard.problems
        findings.notes += sorted({note for shard in found for note in shard.notes})
        if index is not None and not index.problems:
            findings += index.judge()
            if not isinstance(quarantine, Problem):
                findings += quarantine_problems(quarantine, info, index.has_frames)
    return findings


def _check_shards(
    check: Check,
    info: DatasetInfo,
    index: Index | None,
    workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> list[Found]:
    def work() -> Iterator[Work]:
        shards = index.shards() if index is not None else ((shard, None) for shard in info.shards)
        for number, (shard, rows) in enumerate(shards):
            yield Work(number, shard, rows)

    found: list[Found] = []
    images = size = 0
    try:
        with open_engine(workers) as engine:
            for result in engine.map(functools.partial(check_shard, check), work()):
                found.append(result)
                images += info.shards[result.number].samples
                size += info.shards[result.number].bytes
                if on_progress is not None:
                    on_progress(Progress("images", images, info.samples, size))
    finally:
        verify_readers.close()
    return found


def _proper_shards(info: DatasetInfo) -> bool:
    """Names are taken as paths, so they are looked at first."""
    names = [shard.name for shard in info.shards]
    form = re.compile(f"(?:{'|'.join(map(re.escape, info.splits))})-[0-9]{{5,}}\\.tar")
    return names == sorted(set(names)) and all(form.fullmatch(name) for name in names)


def _stray_folders(store: Store, names: list[str]) -> Iterator[str]:
    """Folders that a listing of files does not show: empty ones, and links to others."""
    if not isinstance(store, FolderStore):
        return
    for where, folders, _ in os.walk(store.folder):
        for folder in folders:
            name = os.path.relpath(os.path.join(where, folder), store.folder)
            if name != SHARDS and not any(file.startswith(f"{name}/") for file in names):
                yield name
