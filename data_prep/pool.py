"""Spread the shards of a plan over processes."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_prep.errors import UserError
from data_prep.work import Job, ShardResult, Task, write_shard

_worker: tuple[Task, Any, Any] | None = None


def _start_worker(task: Task, counter: Any, stop: Any) -> None:
    """Runs once in each new process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets `stop`
    _worker = (task, counter, stop)
    warnings.simplefilter("ignore")  # Pillow's, on images that are then judged by what they decode to


class Stopped(Exception):
    """The parent gave up; the shard in hand is abandoned."""


def _work(job: Job) -> ShardResult:
    assert _worker is not None
    task, counter, stop = _worker

    def tick(count: int) -> None:
        with counter.get_lock():
            counter.value += count
        if stop.is_set():
            raise Stopped

    return write_shard(task, job, tick)


def run(
    task: Task, jobs: Iterator[Job], workers: int, total: int, on_progress: Callable[[int, int], None] | None
) -> Generator[ShardResult, None, None]:
    """Write all shards.

    Args:
        task: the settings.
        jobs: the shards; taken as they are needed.
        workers: processes; 1 works in this one.
        total: number of images, for `on_progress`.
        on_progress: called now and then with images done and images in all.

    Yields:
        Results as they come, in any order. Closing the iterator stops the workers.

    Raises:
        UserError: a worker was killed from outside.
    """
    report = on_progress or (lambda done, total: None)
    if workers == 1:
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        for job in jobs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = write_shard(task, job, tick)
            yield result
        return
    # Not fork: the parent has threads (Arrow, the progress bar).
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task, counter, stop))
    running: set[Future[ShardResult]] = set()
    try:
        while True:
            for job in jobs:
                running.add(pool.submit(_work, job))
                if len(running) > 2 * workers:  # so that the names of a whole hospital are not in flight at once
                    break
            if not running:
                return
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            report(counter.value, total)
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for lack of memory; use fewer --workers") from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
