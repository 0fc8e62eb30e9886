"""What the network between processes gives: right values, and how many bytes a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from medpretrain.preflight.report import Link, Moved
from medpretrain.training.process import Process

_LEAST = 1 << 16
_MOST = {"cpu": 1 << 24, "cuda": 1 << 28}
_LONG_S = 0.25
"""Sizes grow until one takes so long: a slow link must not take minutes."""


def all_reduce_right(process: Process) -> bool:
    """Whether the sum of known whole numbers is right on this process."""
    numbers = torch.arange(_LEAST, dtype=torch.int64, device=process.device)
    mine = numbers * (process.rank + 1)
    dist.all_reduce(mine)
    return bool((mine == numbers * (process.world * (process.world + 1) // 2)).all())


def all_gather_right(process: Process) -> bool:
    """Whether every process's whole numbers arrive here, each in its place."""
    numbers = torch.arange(_LEAST, dtype=torch.int64, device=process.device)
    found = [torch.empty_like(numbers) for _ in range(process.world)]
    dist.all_gather(found, numbers * process.world + process.rank)
    return all(bool((part == numbers * process.world + rank).all()) for rank, part in enumerate(found))


def all_reduce_speed(process: Process) -> Moved:
    """Of all processes together; see `Moved` for how it is counted."""

    def once(size: int) -> float:
        values = torch.zeros(size // 4, device=process.device)
        return _timed(process, lambda: dist.all_reduce(values))

    size, seconds = _grown(process, once)
    return Moved(size, seconds, size / seconds * 2 * (process.world - 1) / process.world)


def all_gather_speed(process: Process) -> Moved:
    """Of all processes together; see `Moved` for how it is counted."""

    def once(size: int) -> float:
        values = torch.zeros(max(1, size // 4 // process.world), device=process.device)
        found = [torch.empty_like(values) for _ in range(process.world)]
        return _timed(process, lambda: dist.all_gather(found, values))

    size, seconds = _grown(process, once)
    return Moved(size, seconds, size / seconds * (process.world - 1) / process.world)


def links(process: Process) -> tuple[Link, ...]:
    """From some other hosts to this one; a collective of all processes, in which the first of each host sends.

    Host i sends to host i + 1, then to i + 2, i + 4, ...: all hosts at a time, so it takes as many rounds as the number
    of hosts has bits, and every host has as many links each way. A round has two halves, or a link that is slow one way
    would seem slow both ways.
    """
    nodes, here = process.world // process.local_world, process.rank // process.local_world
    found = []
    shift = 1
    while shift < nodes:
        to, origin = (here + shift) % nodes, (here - shift) % nodes
        for half in (0, 1):
            sends, receives = (here // shift) % 2 == half, (origin // shift) % 2 == half

            leads = process.local_rank == 0
            size, _, own = _rounds(
                process,
                partial(
                    _exchanged,
                    process,
                    to=to * process.local_world if leads and sends else None,
                    origin=origin * process.local_world if leads and receives else None,
                ),
            )
            if leads and receives:
                found.append(Link(origin, here, Moved(size, own, size / own)))
        shift *= 2
    return tuple(found)


def _exchanged(process: Process, size: int, *, to: int | None, origin: int | None) -> float:
    """Seconds until all came that `origin` sent; on CUDA until all was sent too. 0 where nothing comes."""
    out = torch.zeros(size, dtype=torch.uint8, device=process.device)
    into = torch.empty_like(out)
    _together(process)
    _synchronise(process)
    began = time.perf_counter()
    works = [dist.P2POp(dist.isend, out, to)] if to is not None else []
    works += [dist.P2POp(dist.irecv, into, origin)] if origin is not None else []
    if process.device.type == "cuda":
        for work in dist.batch_isend_irecv(works) if works else ():
            work.wait()
        _synchronise(process)
        return time.perf_counter() - began if origin is not None else 0.0
    sending = dist.isend(out, to) if to is not None else None
    took = 0.0
    if origin is not None:
        dist.recv(into, origin)
        took = time.perf_counter() - began
    if sending is not None:
        sending.wait()
    return took


def _grown(process: Process, once: Callable[[int], float]) -> tuple[int, float]:
    """The size at which it was measured, and the seconds of the slowest process."""
    size, slowest, _ = _rounds(process, once)
    return size, slowest


def _rounds(process: Process, once: Callable[[int], float]) -> tuple[int, float, float]:
    """Larger and larger, until the slowest process takes long; gives size, the slowest's and this process's seconds."""
    once(_LEAST)  # connections are made now
    size = _LEAST
    while True:
        own = [once(size)]
        slowest = [_largest(process, own[0])]
        if slowest[0] > _LONG_S or size * 4 > _MOST[process.device.type]:
            break
        size *= 4
    while sum(slowest) < 2 * _LONG_S and len(slowest) < 5:
        own.append(once(size))
        slowest.append(_largest(process, own[-1]))
    return size, median(slowest), median(own)


def _timed(process: Process, work: Callable[[], object]) -> float:
    _together(process)
    began = time.perf_counter()
    work()
    _synchronise(process)
    return time.perf_counter() - began


def _together(process: Process) -> None:
    _largest(process, 0.0)


def _largest(process: Process, value: float) -> float:
    largest: Tensor = torch.tensor([value], dtype=torch.float64, device=process.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest.item())


def _synchronise(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
