"""What a training step sends and how long that takes: formulas, checked against counted bytes and measured times by
benchmarks/weak_scaling.py; docs/scaling.md says what follows from them.

Everything comes from shapes. All that is sent is float32, also under `train.precision=bf16`: parameters, and so
gradients, are. An element has 4 bytes, and a rate is of one direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
When = Literal["forward", "backward", "blocking"]
Shape = tuple[int, ...]

_FLOAT = 4
_TRAVERSALS: dict[Kind, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often the best algorithm sends (n - 1) / n of the data from each of n ranks (Patarasuk & Yuan 2009)."""
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20  # bytes; torch's defaults for DDP
_ZERO_BUCKET = 1 << 27  # bytes; strategies/deepspeed.py


@dataclass(frozen=True)
class Network:
    """One of a method's networks, as far as ranks tell each other of it.

    Attributes:
        units: the shapes of parameters, in groups that FSDP2 gathers together: each block, then the rest.
        calls: forward passes in a step; views of two sizes make two.
        trained: whether gradients are asked for.
        norms: channels of each of its BatchNorm layers that see the global batch.
    """

    units: tuple[tuple[Shape, ...], ...]
    calls: int = 1
    trained: bool = True
    norms: tuple[int, ...] = ()

    @property
    def shapes(self) -> list[Shape]:
        return [shape for unit in self.units for shape in unit]

    @property
    def bytes(self) -> int:
        return _FLOAT * sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in a step.

    Attributes:
        what: gradients, parameters, embeddings, ...
        pieces: bytes of each of them, in their order: of the whole that a reduce-scatter starts from, and of the whole
            that an all-gather ends with.
        when: what of the step's computation they may run beside; `blocking` runs beside nothing.
        needed: bytes of `pieces` without padding.
        done_as: what is called in place of `kind`.
    """

    what: str
    kind: Kind
    pieces: tuple[float, ...]
    when: When = "blocking"
    needed: float | None = None
    done_as: Kind | None = None

    def least(self, world: int) -> float:
        """Bytes that each rank must send at least."""
        needed = sum(self.pieces) if self.needed is None else self.needed
        return _TRAVERSALS[self.kind] * needed * (world - 1) / world

    def sent(self, world: int) -> float:
        """Bytes that each rank does send."""
        return _TRAVERSALS[self.done_as or self.kind] * sum(self.pieces) * (world - 1) / world


@dataclass(frozen=True)
class Cluster:
    """Hosts of equal GPUs.

    Attributes:
        within: bytes a second that a GPU sends to others of its host.
        between: bytes a second that a host sends, all its GPUs together.
        latency_within, latency_between: seconds of a message.
    """

    nodes: int
    gpus: int
    within: float
    between: float
    latency_within: float = 0.0
    latency_between: float = 0.0

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def seconds(self, exchange: Exchange, *, gloo: bool = False) -> list[float]:
        """Of each piece, by hierarchical rings: a byte enters a host once and is passed on inside it. NCCL sums what is
        small by trees, of fewer messages; gloo does not.

        >>> two = Cluster(nodes=2, gpus=1, within=1, between=100)
        >>> two.seconds(Exchange("gradients", "all_reduce", (50, 100)))
        [0.5, 1.0]
        """
        a_byte = (self.nodes - 1) / self.nodes / self.between + (self.gpus - 1) / self.gpus / self.within
        done = exchange.done_as or exchange.kind
        tree = done == "all_reduce" and not gloo
        hops = math.ceil(math.log2(self.nodes)) if tree else self.nodes - 1
        a_round = hops * self.latency_between + (self.gpus - 1) * self.latency_within
        return [_TRAVERSALS[done] * (piece * a_byte + a_round) for piece in exchange.pieces]


def step_exchanges(
    networks: Sequence[Network],
    *,
    world: int,
    strategy: str,
    zero_stage: int = 2,
    micro_batches: int = 1,
    gathered: float = 0,
    gathered_alone: float = 0,
    averaged: float = 0,
    gloo: bool = False,
) -> list[Exchange]:
    """All that the ranks of a run tell each other in one step, apart from metrics.

    Args:
        networks: those that are called, in the order in which they are defined.
        gathered: elements of embeddings that each rank has and all need, with their gradient on the way back.
        gathered_alone: the same of embeddings without gradient.
        averaged: elements of a mean over ranks, as DINO's centre.
        gloo: on CPU; BatchNorm is a layer of our own there.

    Raises:
        ValueError: ZeRO-3.

    >>> linear = Network(units=(((1000, 100),),))
    >>> step = step_exchanges([linear], world=4, strategy="ddp")
    >>> {one.what: one.sent(world=4) for one in step}
    {'gradients': 600000.0, 'signals': 12.0}
    """
    trained = [network for network in networks if network.trained]
    found = {"ddp": _ddp, "fsdp2": _fsdp2, "deepspeed": _zero}[strategy](networks, world, micro_batches, zero_stage)
    whole_rows = _FLOAT * world
    if gathered:
        found.append(Exchange("embeddings", "all_gather", (gathered * whole_rows,)))
        found.append(Exchange("gradients of embeddings", "reduce_scatter", (gathered * whole_rows,)))
    if gathered_alone:
        found.append(Exchange("embeddings", "all_gather", (gathered_alone * whole_rows,)))
    if averaged:
        found.append(Exchange("mean", "all_reduce", (averaged * _FLOAT,)))
    found += _batch_norm(networks, world, micro_batches, gloo)
    if strategy != "ddp":
        found.append(Exchange("norms", "all_reduce", (8 * sum(len(network.shapes) for network in trained),)))
    found.append(Exchange("signals", "all_reduce", (8,)))
    return [one for one in found if one.pieces]


def _ddp(networks: Sequence[Network], world: int, micro_batches: int, stage: int) -> list[Exchange]:
    """Gradients once a step, with the last micro-batch."""
    return [Exchange("gradients", "all_reduce", ddp_buckets(networks), "backward")]


def ddp_buckets(networks: Sequence[Network]) -> tuple[int, ...]:
    """Bytes of the buckets in which DDP sums gradients: from the last parameter to the first, a bucket is full when it
    has 25 MiB, the first when it has 1 MiB.

    >>> ddp_buckets([Network(units=(((1 << 20,), (1 << 22,), (1 << 20,)),))])  # 4, 16 and 4 MiB
    (4194304, 20971520)
    """
    buckets: list[int] = []
    size = 0
    shapes = [shape for network in networks if network.trained for shape in network.shapes]
    for shape in reversed(shapes):
        size += _FLOAT * math.prod(shape)
        if size >= (_BUCKET if buckets else _FIRST_BUCKET):
            buckets.append(size)
            size = 0
    return tuple([*buckets, size] if size else buckets)


def _fsdp2(networks: Sequence[Network], world: int, micro_batches: int, stage: int) -> list[Exchange]:
    """Parameters before each forward pass and again before its backward pass, gradients after it, for every
    micro-batch; with several, there is a forward pass without gradient before. Parameters of one row are whole."""
    found = []
    forwards = 2 * micro_batches if micro_batches > 1 else 1
    for network in networks:
        cut = [[shape for shape in unit if not _one_row(shape)] for unit in network.units]
        padded = tuple(sum(_padded(shape, world) for shape in unit) for unit in cut)
        once = _FLOAT * sum(math.prod(shape) for unit in cut for shape in unit)
        runs = network.calls * forwards
        needed = runs * once
        found.append(Exchange("parameters, forward", "all_gather", padded * runs, "forward", needed))
        if network.trained:
            runs = network.calls * micro_batches
            needed = runs * once
            found.append(Exchange("parameters, backward", "all_gather", padded * runs, "backward", needed))
            # Calls of one backward pass add up before they are sent.
            needed = micro_batches * once
            found.append(Exchange("gradients", "reduce_scatter", padded * micro_batches, "backward", needed))
            whole = tuple(_FLOAT * math.prod(shape) for shape in network.shapes if _one_row(shape))
            found.append(Exchange("gradients of one row", "all_reduce", whole))
    return found


def _one_row(shape: Shape) -> bool:
    return math.prod(shape[:1]) == 1


def _padded(shape: Shape, world: int) -> int:
    """Bytes of a parameter that is cut along its rows, with as many on each rank."""
    return _FLOAT * math.ceil(shape[0] / world) * world * math.prod(shape[1:])


def _zero(networks: Sequence[Network], world: int, micro_batches: int, stage: int) -> list[Exchange]:
    if stage == 3:
        raise ValueError("what ZeRO-3 gathers depends on what it still holds, and has no formula here")
    gradients = sum(network.bytes for network in networks if network.trained)
    pieces = _pieces(gradients, _ZERO_BUCKET)
    if stage == 0:
        return [Exchange("gradients", "all_reduce", pieces, "backward")]
    # Stage 2 has no room for a sum of micro-batches, stage 1 has. DeepSpeed sums whole buckets on every rank.
    times = micro_batches if stage == 2 else 1
    return [
        Exchange("gradients", "reduce_scatter", pieces * times, "backward", done_as="all_reduce"),
        Exchange("parameters", "all_gather", (gradients,)),
    ]


def _pieces(size: int, bucket: int) -> tuple[int, ...]:
    full, rest = divmod(size, bucket)
    return (bucket,) * full + ((rest,) if rest else ())


def _batch_norm(networks: Sequence[Network], world: int, micro_batches: int, gloo: bool) -> list[Exchange]:
    forward: list[float] = []
    backward: list[float] = []
    for network in networks:
        passes = network.calls * (2 * micro_batches if micro_batches > 1 else 1)
        for channels in network.norms:
            if gloo:  # sums, then squares about their mean
                both = [_FLOAT * (channels + 1), _FLOAT * channels]
                forward += both * passes
                backward += both * network.calls * micro_batches * network.trained
            else:  # torch's SyncBatchNorm gathers mean, deviation and count
                forward += [_FLOAT * (2 * channels + 1) * world] * passes
                backward += [_FLOAT * 2 * channels] * network.calls * micro_batches * network.trained
    return [
        Exchange("BatchNorm, forward", "all_reduce" if gloo else "all_gather", tuple(forward)),
        Exchange("BatchNorm, backward", "all_reduce", tuple(backward)),
    ]


def step_bytes(exchanges: Iterable[Exchange], world: int) -> float:
    """Bytes that each of `world` ranks sends in a step."""
    return sum(one.sent(world) for one in exchanges)


def least_bytes(exchanges: Iterable[Exchange], world: int) -> float:
    """Bytes that each rank must send at least for what the exchanges are to bring about."""
    return sum(one.least(world) for one in exchanges)


def step_seconds(
    exchanges: Sequence[Exchange],
    cluster: Cluster,
    forward_s: float,
    backward_s: float,
    *,
    overlap: bool = True,
    gloo: bool = False,
) -> float:
    """Seconds of a step.

    Args:
        forward_s, backward_s: of a GPU that waits for nobody; the optimizer's time is in one of them.
        overlap: whether exchanges of `forward` and `backward` run beside the computation, as they do on GPUs.

    >>> gradients = Exchange("gradients", "all_reduce", (100, 100), "backward")
    >>> two = Cluster(nodes=2, gpus=1, within=1, between=100)  # one second for each of the buckets
    >>> step_seconds([gradients], two, 1.0, 2.0), step_seconds([gradients], two, 1.0, 2.0, overlap=False)
    (4.0, 5.0)
    """
    took: dict[When, list[float]] = {"forward": [], "backward": [], "blocking": []}
    for one in exchanges:
        took[one.when] += cluster.seconds(one, gloo=gloo)
    blocking = sum(took["blocking"])
    if not overlap:
        return forward_s + backward_s + blocking + sum(took["forward"]) + sum(took["backward"])
    # A forward pass that waits for parameters is a backward pass that makes gradients, seen from its end.
    forward = beside(forward_s, took["forward"][::-1])
    return forward + beside(backward_s, took["backward"]) + blocking


def beside(compute_s: float, pieces_s: Sequence[float]) -> float:
    """Seconds until a computation and the pieces it makes, sent one after another, are through. The computation makes
    them evenly, in proportion to their length.

    >>> beside(4.0, [1.0, 1.0]), beside(4.0, [4.0, 4.0]), beside(4.0, [])
    (5.0, 10.0, 4.0)
    """
    total, made, end = sum(pieces_s), 0.0, 0.0
    for piece in pieces_s:
        made += piece
        end = max(end, compute_s * made / total if total else 0.0) + piece
    return max(end, compute_s)
