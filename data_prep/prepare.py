"""Sources in, a dataset out: plan, work, finish. Each kind of source says how it is opened and read; the rest is here.

The plan is made once and kept; workers write shards, each whole or not at all, and a record of each is kept; whoever
finds every record there finishes. So any number of workers, parts and kills gives the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from data_prep.audit import Audit
from data_prep.dataset import SHARDS, created_by, file_sha256
from data_prep.dataset_info import DatasetInfo, Deidentification
from data_prep.errors import UserError, WorkFailed, nearest
from data_prep.finish import Unusable, finish, refuse_mixed_depths
from data_prep.options import DUPLICATES, Options, Progress, Running
from data_prep.plan import PLAN_ROWS, Base, PlanFile, difference, read_plan, request_sha256, save_plan, write_plan
from data_prep.pool import Engine, open_engine
from data_prep.previous import Previous
from data_prep.records import Records
from data_prep.sources import Source
from data_prep.staging import AUDIT, LINKS, PLAN, RECORDS, Staging, goes_to_url
from data_prep.store import FULL, no_space
from data_prep.work import Job, Reader, ShardResult, Task, write_shard


@dataclass(frozen=True)
class Summary:
    """What a run made: the dataset at `out`, with warnings for the user to read."""

    out: str
    private: Path
    info: DatasetInfo
    warnings: list[str]
    seconds: float


@dataclass(frozen=True)
class Unfinished:
    """A part ended, and `left` shards of other parts are still to be written; the last part finishes."""

    out: str
    left: int


class Kind(Protocol):
    """One kind of source: `prep images`, `prep dicom`, ..."""

    @property
    def source(self) -> Path:
        """What the user named."""

    @property
    def root(self) -> Path:
        """The folder that names are relative to, or the file they are in."""

    def options(self) -> dict[str, Any]:
        """What of its options goes into dataset.json: nothing that tells a path."""

    def request(self) -> dict[str, Any]:
        """What else decides the result, such as where the source is; stays private."""

    def open(self, engine: Engine, state: Path, report: Callable[[int, int | None], None]) -> Source:
        """Read names, labels and patients; `state` is a folder that stays until the run is finished."""

    def reader(self, state: Path) -> Reader:
        """How workers read the sources; called in a run that goes on too, without `open`."""

    def deidentification(self) -> Deidentification | None:
        """For dataset.json."""

    @property
    def measured(self) -> int:
        """About how many train images to measure."""


def prepare(kind: Kind, out: str | Path, options: Options, running: Running) -> Summary | Unfinished:
    """Turn a source into a dataset at `out`, a folder or an fsspec URL.

    The result depends on the source and the options alone. Beside it, in OUT.private, lies the table that links samples
    to their sources; it must not leave with the dataset.

    Raises:
        UserError: anything in the source or the options that cannot be used; `out` is then left as it was, but for a
            URL that is overwritten: from its first new shard on it is no dataset.
        WorkFailed: a full disk, a killed worker; what is done is kept, and the same command goes on.
    """
    started = time.monotonic()
    check(out, options, running)
    staging = Staging(out, running.private, running.overwrite, running.append)
    _refuse_nesting(kind.source, staging)
    request = {
        "created_by": created_by(),
        "source_root": str(kind.root.resolve()),
        "append": running.append,
        **kind.options(),
        **kind.request(),
        **{name: getattr(options, name) for name in ("seed", "shard_size")},
        "split": None if options.split is None else dict(options.split),
        **({"out": staging.out} if staging.remote else {}),
    }
    engines = open_engine(running.workers, running.cluster, running.executor)
    with _writable(staging), staging.enter(running.part), engines as engine:
        audit = Audit(staging.private / AUDIT, staging.final_private / AUDIT)
        with staging.alone():
            done = _already_done(staging, request)
            if done is not None:
                (staging.state / PLAN).unlink()
            else:
                done = _finished_by_others(staging, request, running)
            if done is not None:
                return Summary(staging.out, staging.final_private, done, [], time.monotonic() - started)
            previous = Previous.of(staging) if running.append else None
            shown = {**kind.options(), **_shown(options)}
            claimed = kind.deidentification()
            if previous is not None:
                previous.refuse_other(shown, None if claimed is None else claimed.key_id, options.seed)
            plan = _planned(kind, staging, request, options, running, engine, previous, audit)
        records = Records(staging.state / RECORDS, plan, staging.store)
        warnings = list(plan.notes)
        with _forgets_what_cannot_be(staging, plan, running):
            _work(kind, staging, plan, records, running, engine)
        with staging.alone():
            if read_plan(staging.state) is None:  # another part was last, and has finished
                there = staging.existing()
                assert there is not None
                info = there[0]
            else:
                left = sum(not records.done(number) for number in range(len(plan.jobs)))
                if left:
                    if running.part is None:
                        raise WorkFailed(f"{staging.out}: {left} shards vanished; give the same command again")
                    return Unfinished(staging.out, left)
                with _forgets_what_cannot_be(staging, plan, running):
                    info, more = finish(staging, plan, records, options, shown, claimed, previous, audit)
                warnings += more
                staging.commit()
                (staging.state / PLAN).unlink()
    return Summary(staging.out, staging.final_private, info, warnings, time.monotonic() - started)


def _shown(options: Options) -> dict[str, Any]:
    """The options that every kind has, but for the seed."""
    return {
        "split": None if options.split is None else dict(options.split),
        "shard_size": options.shard_size,
        "drop_duplicates": options.drop_duplicates,
    }


def check(out: str | Path, options: Options, running: Running) -> None:
    """What `prepare` begins with; looks at no file, so that a launcher can ask it for another machine.

    Raises:
        UserError: a value that cannot be, or options that do not go together.
    """
    for name, value in (("shard-size", options.shard_size), ("workers", running.workers)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, not {options.seed}")
    for name, choice in (("duplicates", options.duplicates), ("drop-duplicates", options.drop_duplicates)):
        if choice not in DUPLICATES:
            raise UserError(f"--{name} {choice!r}{nearest(choice, DUPLICATES)}")
    if DUPLICATES.index(options.drop_duplicates) > DUPLICATES.index(options.duplicates):
        raise UserError(f"--drop-duplicates {options.drop_duplicates} needs --duplicates {options.drop_duplicates}")
    goes_to_url(out, running.private, running.overwrite, running.append)


def _refuse_nesting(source: Path, staging: Staging) -> None:
    if not source.exists():
        raise UserError(f"{source} does not exist")
    inner = source.resolve()
    for place in ([] if staging.remote else [Path(staging.out)]) + [staging.final_private]:
        outer = place.resolve()
        if inner == outer or outer in inner.parents or (inner in outer.parents and inner.is_dir()):
            raise UserError(f"the output {place} and the source {source} lie inside each other")


@contextlib.contextmanager
def _forgets_what_cannot_be(staging: Staging, plan: PlanFile, running: Running) -> Iterator[None]:
    """Where the images cannot become a dataset, there is nothing to go on from; other parts may still be at it."""
    try:
        yield
    except Unusable:
        if running.part is None:
            staging.clear()
            if staging.remote:
                for job in plan.jobs:
                    for ending in (".tar", ".idx"):
                        staging.store.remove(f"{SHARDS}/{job.shard.removesuffix('.tar')}{ending}")
        raise


@contextlib.contextmanager
def _writable(staging: Staging) -> Iterator[None]:
    """A full disk or a missing permission is something the user can mend."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(staging.state, error) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            place = error.filename or staging.out
            raise UserError(f"{staging.out} cannot be written: {place}: {os.strerror(error.errno)}") from None
        if error.errno in (errno.EIO, errno.ESTALE):
            raise WorkFailed(f"{staging.state}: {os.strerror(error.errno)}; what is done is kept there") from None
        raise


def _already_done(staging: Staging, request: Mapping[str, Any]) -> DatasetInfo | None:
    """The dataset, where a kill came after its last rename and the same command was given again."""
    plan = read_plan(staging.state)
    if plan is None or not staging.landed() or difference(plan.request, request) is not None:
        return None
    there = staging.existing()
    return None if there is None else there[0]


def _finished_by_others(staging: Staging, request: Mapping[str, Any], running: Running) -> DatasetInfo | None:
    """The dataset, where a part is given after the last one ended: again, or with no shard of its own."""
    links = staging.final_private / LINKS
    if running.part is None or running.append or read_plan(staging.state) is not None or not links.is_file():
        return None
    there = staging.existing()
    made_by = (pq.read_schema(links).metadata or {}).get(b"request", b"").decode()
    if there is None or made_by != request_sha256(request):
        return None
    if running.overwrite:  # or the other parts' shards would be thrown away with nobody to write them again
        raise UserError(f"{staging.out} was made by this very command; to make it anew in parts, remove it first")
    return there[0]


def _planned(
    kind: Kind,
    staging: Staging,
    request: Mapping[str, Any],
    options: Options,
    running: Running,
    engine: Engine,
    previous: Previous | None,
    audit: Audit,
) -> PlanFile:
    """The plan to go on with, or a new one."""
    plan = read_plan(staging.state)
    there = staging.refuse_foreign()
    if plan is not None and not staging.landed():
        odd = difference(plan.request, request)
        if odd is None and plan.base != (there[1] if running.append and there else None):
            odd = "the dataset that is added to was changed"
        if odd is None and file_sha256(staging.state / PLAN_ROWS) != plan.rows_sha256:
            odd = "its plan is damaged"
        if odd is None:
            audit.say("resumed", shards=len(plan.jobs))
            return plan
        if not running.overwrite:
            forget = f"remove {staging.state}" if running.append else "--overwrite"
            raise UserError(
                f"{staging.out}: an unfinished run with another plan is there ({odd}); give its options to go on, or "
                f"{forget} to forget it"
            )
    staging.refuse_other_parts()
    staging.clear()
    report = running.on_progress or (lambda progress: None)
    source = kind.open(engine, staging.state, lambda done, total: report(Progress("sources", done, total)))
    if previous is not None:
        source = previous.without_known(source)
    if not len(source):
        reasons = Counter(source.rejected.column("reason").to_pylist())
        listed = ", ".join(f"{code} {count}" for code, count in reasons.most_common()) or "no new ones"
        raise UserError(f"{kind.source}: none of {source.found} sources can be used ({listed}); nothing was written")
    base = Base() if previous is None else previous.base
    plan = write_plan(
        staging.state,
        source,
        request,
        options.split,
        options.seed,
        options.shard_size,
        base,
        None if previous is None else previous.sha256,
    )
    audit.say("planned", sources=source.found, shards=len(plan.jobs), options={**kind.options(), **_shown(options)})
    staging.begin()
    save_plan(staging.state, plan)
    return plan


def _work(kind: Kind, staging: Staging, plan: PlanFile, records: Records, running: Running, engine: Engine) -> None:
    """Write the shards that are not yet there."""
    first, step = (running.part[0] - 1, running.part[1]) if running.part is not None else (0, 1)
    mine = range(first, len(plan.jobs), step)
    task = Task(kind.reader(staging.state), staging.store, {name: list(v.names) for name, v in plan.labels.items()})
    total = sum(plan.jobs[number].sources for number in mine)
    report = running.on_progress or (lambda progress: None)
    done = size = quarantined = 0
    depths: Counter[int] = Counter()

    def count(result: ShardResult) -> None:
        nonlocal done, size, quarantined
        done += result.sources
        size += result.file.bytes if result.file is not None else 0
        quarantined += len(result.rejected)
        depths.update(result.rows.column("bit_depth").to_pylist())
        report(Progress("images", done, total, size, quarantined))

    waiting = []
    for number in mine:
        if records.done(number):
            count(records.load(number))
        else:
            waiting.append(number)
    jobs = (plan.job(staging.state, number, kind.measured) for number in waiting)
    write = functools.partial(_write_what_is_seen, kind.root.resolve(), task)
    with contextlib.closing(engine.map(write, jobs)) as results:
        for result in results:
            records.save(result)
            count(result)
            refuse_mixed_depths(depths)


def _write_what_is_seen(root: Path, task: Task, job: Job) -> ShardResult:
    """Write a shard where the source is mounted: elsewhere every image would be set aside as unreadable."""

    def look() -> None:
        if not root.exists():
            raise WorkFailed(f"{root} cannot be seen by a worker; mount it and give the same command again")

    look()
    result = write_shard(task, job)
    look()  # it may have gone away meanwhile
    return result
