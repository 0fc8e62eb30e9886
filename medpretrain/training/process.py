"""Which of the run's processes this one is, and how they agree."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from data_prep.errors import UserError, WorkFailed, nearest
from launchers.head import is_loopback
from medpretrain.health.address import cure, gloo_address, interfaces, meets_elsewhere
from medpretrain.health.flight_recorder import enable_flight_recorder
from medpretrain.health.preemption import end_with_parent

_SHORTEST_TIMEOUT_S = 60.0  # ranks start some seconds apart
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
            except (ValueError, OSError, WorkFailed) as error:
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
def joined(device: str, *, hang_s: float = 600.0, traces: Path | None = None) -> Iterator[Process]:
    """Join the process group that torchrun describes in the environment; alone where it describes none.

    Args:
        device: `cpu`, `cuda` or `auto`.
        hang_s: the recipe's `faults.hang_s`. A collective times out after twice as long, so that the watchdog, which
            can name the rank that hangs, comes first.
        traces: the folder for NCCL's record of the last collectives, should one hang; it need not be there yet.

    Raises:
        UserError: see `choose_device`; other hosts could not find this one.
    """
    end_with_parent()
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
    _refuse_loopback(world, local_world)
    if traces is not None:
        enable_flight_recorder(traces)
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo", timeout=timedelta(seconds=max(2 * hang_s, _SHORTEST_TIMEOUT_S))
    )
    yield process
    # Not after an error: with a rank lost, NCCL's way out may never end, and the process's own end closes all.
    dist.destroy_process_group()


def _refuse_loopback(world: int, local_world: int) -> None:
    address = gloo_address()
    if world == local_world or address is None or not is_loopback(address):
        return
    if meets_elsewhere(os.environ["MASTER_ADDR"]):  # else all "hosts" are this machine
        name = socket.gethostname()
        raise UserError(f"{name} is {address} to itself, where other hosts do not find it: {cure(interfaces())}")
