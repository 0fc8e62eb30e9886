"""Spread work over processes of this machine, or over a Dask cluster, by one interface: `concurrent.futures`."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa

from data_prep.dataset import created_by
from data_prep.errors import UserError, WorkFailed

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 30.0  # seconds for a scheduler, and its first worker, to answer


@dataclass(frozen=True)
class _Silent(Generic[T, R]):
    """A function that shows nothing of its argument: an engine may log its repr, its warnings and its errors."""

    function: Callable[[T], R] = field(repr=False)

    def __call__(self, item: T) -> R | _Failure:
        # Pillow's and pydicom's, on files judged by what they give. Not `catch_warnings`: threads share the filters.
        warnings.filterwarnings("ignore", module=r"(PIL|pydicom|data_prep)\b")
        try:
            return self.function(item)
        except Exception as error:
            return _Failure.of(error)


@dataclass(frozen=True)
class _Failure:
    """An error on its way back, as a value."""

    error: Exception = field(repr=False)

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        if not isinstance(error, (UserError, WorkFailed)):
            error.add_note("in a worker:\n" + traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some libraries' errors cannot travel
            said = RuntimeError(f"{type(error).__name__}: {error}")
            said.add_note("in a worker:\n" + traceback.format_exc())
            return cls(said)
        return cls(error)


@dataclass(frozen=True)
class Engine:
    """Where work is done: `executor` None is this process; `slots` is how many items are worked at a time."""

    executor: Executor | None
    slots: int

    def map(self, function: Callable[[T], R], items: Iterator[T]) -> Generator[R, None, None]:
        """Yield the results in any order; items are taken as they are needed.

        Raises:
            WorkFailed: a worker process was killed from outside, or the cluster went away.
        """
        if self.executor is None:
            for item in items:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = function(item)
                yield result
            return
        silent = _Silent(function)
        running: set[Future[R | _Failure]] = set()
        try:
            while True:
                for item in items:
                    running.add(self.executor.submit(silent, item))
                    if len(running) > 2 * self.slots:  # the names of a whole hospital are never in flight at once
                        break
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    answer = future.result()
                    if isinstance(answer, _Failure):
                        raise answer.error
                    yield answer
        except BrokenProcessPool:
            raise WorkFailed(
                "a worker process was killed, most likely for lack of memory; what is done is kept: give the same "
                "command again, with fewer --workers"
            ) from None
        except CancelledError:
            raise WorkFailed(
                "the cluster took its work back: its scheduler went away; what is done is kept: give the same command "
                "again"
            ) from None
        finally:
            for future in running:
                future.cancel()


@contextlib.contextmanager
def open_engine(workers: int, cluster: str | None = None, executor: Executor | None = None) -> Iterator[Engine]:
    """Processes on this machine, the workers of a Dask scheduler (`tcp://host:8786`), or what the caller brings.

    Raises:
        UserError: the scheduler cannot be reached, or Dask is not installed.
    """
    if cluster is not None:
        with _dask(cluster) as engine:
            yield engine
        return
    if executor is not None or workers == 1:
        yield Engine(executor, workers)
        return
    # Not fork: the parent has threads (Arrow, the progress bar).
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    for _ in range(workers):  # they start while the plan is made
        pool.submit(_start_worker_modules)
    try:
        yield Engine(pool, workers)
    except BaseException:
        # Files appear whole or not at all, so nothing is lost by not waiting for what is in the making.
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker_modules() -> None:
    """Import what all work needs; pyarrow takes pandas along, where it is installed, with the first list."""
    importlib.import_module("data_prep.images")
    pa.array([0])


def _start_worker() -> None:
    """Runs once in each new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    warnings.simplefilter("ignore")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Engine]:
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise UserError("--cluster needs Dask: install medpretrain[cluster]") from None
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--cluster {address}: no Dask scheduler answers ({type(error).__name__})") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise UserError(f"--cluster {address}: the scheduler has no workers") from None
        _refuse_other_versions(client, address)
        slots = sum(client.nthreads().values())
        try:
            # Not pure: equal tasks are never taken for one another, and no result is looked up by name.
            yield Engine(client.get_executor(pure=False), slots)
        except KilledWorker:
            raise WorkFailed(
                f"--cluster {address}: workers died at the same shard again and again, most likely for lack of memory; "
                "what is done is kept: give the same command again"
            ) from None


def _refuse_other_versions(client: Any, address: str) -> None:
    """Before any name is sent: a worker that cannot read a task would log what it was sent."""
    ours = created_by()
    for worker, said in client.run(created_by, on_error="return").items():
        if said != ours:
            theirs = "no medpretrain" if isinstance(said, Exception) else said
            raise UserError(f"--cluster {address}: the worker {worker} has {theirs}, here is {ours}")
