"""Saving while training goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from data_prep.errors import UserError, WorkFailed
from medpretrain.checkpoints.agreement import together
from medpretrain.checkpoints.manifest import CheckpointInfo, Manifest, Stored, Written, check_plain, check_whole
from medpretrain.checkpoints.parts import Layout, Part, joined, lay_out, share
from medpretrain.checkpoints.reading import Found
from medpretrain.checkpoints.retention import retire
from medpretrain.checkpoints.staging import Staging, Streamed, stream
from medpretrain.checkpoints.target import Draft, Target, data_name
from medpretrain.training.process import Process

_PATIENCE = timedelta(minutes=30)  # a process that uploads a large share may be behind the others for long

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a save: `found` or `error`. Seconds are this process's, `bytes` are those of all files."""

    step: int
    found: Found | None
    error: str | None
    bytes: int
    waited_s: float
    """Training stood still: the save before was still being written."""
    staging_s: float
    """Training stood still: values were copied to host memory."""
    writing_s: float
    hashing_s: float
    """That the hash took longer than writing."""
    total_s: float
    """From the call to the commit, or to the error."""


class _Ready(NamedTuple):
    """A process's word that it can write: which ranges, and how many bytes with them."""

    bytes: int
    tensors: dict[str, Stored]


class _Task(NamedTuple):
    """A save whose values are copied."""

    step: int
    about: CheckpointInfo
    layout: Layout
    failure: UserError | None
    began: float
    waited_s: float
    staging_s: float


class Saver:
    """Writes a run's checkpoints; every process has one, and calls it at the same steps.

    A save that fails, the disk being full for example, is logged and told by `outcomes`, and nothing of it stays; the
    run goes on. What only a bug can cause (elements of a tensor that no process has) is raised by the next `save` or
    `wait`, on every process.
    """

    def __init__(
        self,
        target: Target,
        about: CheckpointInfo,
        process: Process,
        *,
        keep: int,
        keep_every: int | None = None,
        keep_best: bool = False,
        background: bool = True,
    ) -> None:
        """Collective: makes a process group of its own.

        Args:
            about: what the checkpoints belong to.
            keep: how many of the newest whole ones stay, >= 1; also those of steps that `keep_every` divides, and with
                `keep_best` the one with the lowest metric.
            background: write in a thread while training goes on.

        Raises:
            UserError: `keep` is less than 1.
        """
        if keep < 1:
            raise UserError(f"at least one checkpoint must be kept, not {keep}")
        self._target, self._about, self._process, self._background = target, about, process, background
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._group: dist.ProcessGroup | None = None
        if process.world > 1:
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._staging = Staging(process.device)
        self._thread: threading.Thread | None = None
        self._bug: BaseException | None = None
        self._last: Found | None = None
        self._outcomes: list[Outcome] = []
        self._draft: Draft | None = None  # rank 0's, while it writes
        self._tensors: dict[str, Stored] = {}

    def save(self, step: int, parts: Iterable[Part], extra: Mapping[str, Any], metric: float | None = None) -> None:
        """Copy what `parts` hold and write it as the checkpoint of `step`, replacing an earlier one of that step.

        Collective. Waits for the save before; when it returns, values may change.

        Args:
            parts: copied ones are the same on all processes, in the same order.
            extra: plain JSON, kept in the manifest; rank 0's counts.
            metric: for `keep_best`; one that is not finite is no metric.

        Raises:
            TypeError: `extra` holds what JSON does not.
        """
        check_plain(dict(extra), "extra")
        assert step >= 0
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        rank, world = self._process.rank, self._process.world
        layout = lay_out(share(list(parts), rank, world), data_name(rank, world))
        failure = None
        try:
            self._staging.fill(layout)
        except UserError as error:  # travels with the other processes' word
            failure = error
        known = metric if metric is not None and math.isfinite(metric) else None
        about = dataclasses.replace(self._about, step=step, extra=dict(extra), metric=known)
        # The values are copied; to hold on to them would keep alive what the caller made for the save alone.
        layout = dataclasses.replace(layout, slices=())
        task = _Task(step, about, layout, failure, began, waited - began, time.perf_counter() - waited)
        if self._background:
            self._thread = threading.Thread(target=self._run, args=(task,), name=f"checkpoint-{step}", daemon=True)
            self._thread.start()
        else:
            self._run(task)
            self._raise_bug()

    def wait(self) -> Found | None:
        """Until nothing is being written; the checkpoint that this Saver committed last, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_bug()
        return self._last

    def outcomes(self) -> list[Outcome]:
        """Of the saves that ended since the last call."""
        found, self._outcomes[:] = list(self._outcomes), []
        return found

    def close(self) -> None:
        """Wait, and give the process group back."""
        try:
            self.wait()
        finally:
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
                self._group = None

    def _raise_bug(self) -> None:
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug

    def _run(self, task: _Task) -> None:
        """All of a save but the copy: the same communication on every process, whatever fails where."""
        process, group = self._process, self._group
        found, error, size = None, None, 0
        streamed = Streamed(0, "", 0.0, 0.0)

        def written() -> Streamed:
            nonlocal streamed
            opened = self._target.create(draft, draft.file(process.rank, process.world))
            streamed = stream(opened, task.layout.header, self._staging)
            return streamed

        try:
            draft, size = together(process, lambda: self._ready(task), lambda ready: self._begin(task, ready), group)
            about, sha256 = together(process, written, lambda files: self._commit(task, files), group)
            self._last = found = Found(self._target, draft.name, about, sha256)
            if process.leads:
                self._retire(task.step)
        except (UserError, WorkFailed, OSError) as failure:
            error = " ".join(str(failure).split())
            if process.leads:
                _log.error("the checkpoint of step %d could not be saved in %s: %s", task.step, self._target, error)
        except Exception as failure:
            self._bug = failure
            error = f"{type(failure).__name__}: {failure}"
        finally:
            if self._draft is not None:
                if found is None:
                    self._target.abandon(self._draft)
                self._target.end(self._draft)
                self._draft = None
        seconds = (task.waited_s, task.staging_s, streamed.writing_s, streamed.hashing_s)
        self._outcomes.append(Outcome(task.step, found, error, size, *seconds, time.perf_counter() - task.began))

    def _ready(self, task: _Task) -> _Ready:
        if task.failure is not None:
            raise task.failure
        return _Ready(task.layout.bytes, task.layout.tensors)

    def _begin(self, task: _Task, ready: list[_Ready]) -> tuple[Draft, int]:
        """Rank 0: nothing is missing, and there is room."""
        tensors = joined(each.tensors for each in ready)
        check_whole(tensors)
        names = [data_name(rank, len(ready)) for rank in range(len(ready))]
        files = {name: Written(each.bytes, "0" * 64) for name, each in zip(names, ready, strict=True)}
        size = sum(each.bytes for each in ready) + len(Manifest(task.about, files, tensors).to_bytes())
        self._draft, self._tensors = self._target.begin(task.step, size, len(ready) + 1), tensors
        return self._draft, size

    def _commit(self, task: _Task, files: list[Streamed]) -> tuple[CheckpointInfo, str]:
        """Rank 0: all files are there."""
        draft = self._draft
        assert draft is not None
        names = [draft.file(rank, len(files)) for rank in range(len(files))]
        entries = {name: Written(file.bytes, file.sha256) for name, file in zip(names, files, strict=True)}
        marked = {
            name: dataclasses.replace(
                stored,
                pieces=tuple(dataclasses.replace(piece, file=draft.mark + piece.file) for piece in stored.pieces),
            )
            for name, stored in self._tensors.items()
        }
        manifest = Manifest(task.about, entries, marked)
        self._target.commit(draft, manifest)
        return task.about, hashlib.sha256(manifest.to_bytes()).hexdigest()

    def _retire(self, step: int) -> None:
        try:
            retire(self._target, step, keep=self._keep, keep_every=self._keep_every, keep_best=self._keep_best)
        except (OSError, WorkFailed) as error:  # the new one is there all the same
            _log.warning("old checkpoints could not be removed: %s", error)
