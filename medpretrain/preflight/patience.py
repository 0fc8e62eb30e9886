"""Waiting for what may never answer: a file system whose server is away, a store whose host has lost its power."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")
_LOOK_S = 1.0


def answered(
    work: Callable[[], Result],
    patience_s: float,
    *,
    signs: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Result:
    """What `work` gives, in a thread of its own: calls into the kernel or into torch may stand still for ever, and no
    signal's handler runs while they do.

    Args:
        patience_s: of waiting; it begins anew whenever `signs` gives another value than before.
        meanwhile: called every second.

    Raises:
        TimeoutError: there was no answer. The thread is left behind, and ends with the process.

    >>> answered(lambda: 6 * 7, 1.0)
    42
    """
    answer: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    last, since = signs(), time.monotonic()
    while True:
        try:
            result, error = answer.get(timeout=max(0.0, min(_LOOK_S, since + patience_s - time.monotonic())))
        except Empty:
            meanwhile()
            if (now := signs()) != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since >= patience_s:
                raise TimeoutError from None
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
