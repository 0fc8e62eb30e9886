"""Which of the run's processes this one is, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from data_prep.errors import UserError, nearest

_TIMEOUT = timedelta(minutes=10)  # a lost rank should not hold the others for long
Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """One process of a run: `rank` of `world`, `local_world` of them on this host, and its device."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the host's cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)

    def agreed(self, decide: Callable[[], Result]) -> Result:
        """What rank 0 decides, on every rank; an error it raises is raised on every rank."""
        if self.world == 1:
            return decide()
        told: list[tuple[Result | None, Exception | None]] = [(None, None)]
        if self.leads:
            try:
                told = [(decide(), None)]
            except (ValueError, OSError) as error:
                told = [(None, error)]
        dist.broadcast_object_list(told, src=0)
        result, failure = told[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `cpu`, `cuda` or `auto` means for a process of this host.

    Raises:
        UserError: another word, or more processes than CUDA devices.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"there is no device {device!r}{nearest(device, ('auto', 'cpu', 'cuda'))}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank:
        seen = torch.cuda.device_count()
        raise UserError(
            f"process {local_rank} of this host has no CUDA device: torch sees {seen}; device=cpu needs none"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the process group that torchrun describes in the environment; alone where it describes none.

    Args:
        device: `cpu`, `cuda` or `auto`.

    Raises:
        UserError: see `choose_device`.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = choose_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    process = Process(rank, world, local_rank, local_world, own)
    if world == 1:
        yield process
        return
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield process
    finally:
        dist.destroy_process_group()
