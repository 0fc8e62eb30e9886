"""Spread work over processes of this machine, or over a Dask cluster, by one interface: `concurrent.futures`."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from data_prep.errors import UserError, WorkFailed

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Engine:
    """Where work is done: `executor` None is this process; `slots` is how many items are worked at a time."""

    executor: Executor | None
    slots: int

    def map(self, function: Callable[[T], R], items: Iterator[T]) -> Generator[R, None, None]:
        """Yield the results in any order; items are taken as they are needed.

        Raises:
            WorkFailed: a worker process was killed from outside.
        """
        if self.executor is None:
            for item in items:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's and pydicom's, on files judged by what they give
                    result = function(item)
                yield result
            return
        running: set[Future[R]] = set()
        try:
            while True:
                for item in items:
                    running.add(self.executor.submit(function, item))
                    if len(running) > 2 * self.slots:  # the names of a whole hospital are never in flight at once
                        break
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            raise WorkFailed(
                "a worker process was killed, most likely for lack of memory; what is done is kept: give the same "
                "command again, with fewer --workers"
            ) from None
        finally:
            for future in running:
                future.cancel()


@contextlib.contextmanager
def open_engine(workers: int, cluster: str | None) -> Iterator[Engine]:
    """Processes on this machine, or the workers of a Dask scheduler (`tcp://host:8786`).

    Raises:
        UserError: the scheduler cannot be reached, or Dask is not installed.
    """
    if cluster is not None:
        with _dask(cluster) as engine:
            yield engine
        return
    if workers == 1:
        yield Engine(None, 1)
        return
    # Not fork: the parent has threads (Arrow, the progress bar).
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        yield Engine(pool, workers)
    except BaseException:
        # Files appear whole or not at all, so nothing is lost by not waiting for what is in the making.
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"--cluster {address}: no Dask scheduler answers ({type(error).__name__})") from None
    with client:
        client.wait_for_workers(1, timeout=60)
        slots = sum(client.nthreads().values())
        try:
            # Not pure: equal tasks are never taken for one another, and no result is looked up by name.
            yield Engine(client.get_executor(pure=False, retries=2), slots)
        except KilledWorker:
            raise WorkFailed(
                f"--cluster {address}: workers died at the same shard again and again, most likely for lack of memory; "
                "what is done is kept: give the same command again"
            ) from None
