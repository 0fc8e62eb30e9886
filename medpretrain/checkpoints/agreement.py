"""Work that all processes do at once, and that fails for all of them or for none."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from data_prep.errors import WorkFailed
from medpretrain.training.process import Process

Part = TypeVar("Part")
Decision = TypeVar("Decision")


@dataclass(frozen=True)
class _Failure:
    error: Exception


def together(
    process: Process | None,
    work: Callable[[], Part],
    decide: Callable[[list[Part]], Decision],
    group: dist.ProcessGroup | None = None,
) -> Decision:
    """`work` on every process; what rank 0 decides from all results, on every process.

    Whatever is raised, in `work` on any process or in `decide`, travels with the results and is raised on every
    process: none waits for another that failed.

    Raises:
        WorkFailed: another process is lost.

    Args:
        process: None means alone, whatever other processes there are.
        group: through which they speak; the default group if None.
    """
    if process is None or process.world == 1:
        return decide([work()])
    mine = _attempt(work)
    gathered: list[Any] | None = [None] * process.world if process.leads else None
    told: list[Any] = [None]
    try:
        dist.gather_object(mine, gathered, dst=0, group=group)
        if gathered is not None:
            failure = next((one for one in gathered if isinstance(one, _Failure)), None)
            told = [failure or _attempt(lambda: decide(gathered))]
        dist.broadcast_object_list(told, src=0, group=group)
    except RuntimeError as error:  # what `work` and `decide` raise is caught before
        raise WorkFailed(f"another process of the run is lost: {str(error).splitlines()[0][:200]}") from error
    if isinstance(told[0], _Failure):
        raise told[0].error
    decision: Decision = told[0]
    return decision


def _attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # raised again, on every process
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return _Failure(RuntimeError(f"{type(error).__name__}: {error}"))
        return _Failure(error)
