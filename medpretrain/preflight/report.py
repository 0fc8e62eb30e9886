"""What a process of the rehearsal reports, as far as it came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moved:
    """Bytes in seconds.

    Attributes:
        bytes: of the tensor (all-reduce), of all gathered tensors (all-gather), or of a message.
        bus_bytes_s: what a link has to carry, as nccl-tests count it, so that it can be compared with the hardware:
            bytes / seconds x 2 (n - 1) / n for an all-reduce over n processes, x (n - 1) / n for an all-gather, x 1 for
            a message.
    """

    bytes: int
    seconds: float
    bus_bytes_s: float


@dataclass(frozen=True)
class Link:
    """From one host to another, by their places; measured by the receiver."""

    sender: int
    receiver: int
    moved: Moved


@dataclass(frozen=True)
class Rehearsed:
    """Some steps of the recipe on one process.

    Attributes:
        images: of this process in a step.
        step_s, wait_s: median seconds of a step, and that it waited for data before.
        first_s: seconds of the first step, with what is compiled and allocated then.
        decode_images_s: images that this process's stream makes in a second where nothing else is done.
        resident_bytes: of the host's memory, at most.
        peak_bytes: on CUDA of the device's memory: what torch had allocated at most, and what is not torch's there.
        device_bytes: on CUDA the memory of the device, else None.
        checkpoint_bytes: of this process's file of a checkpoint.
        gradient_bytes: of all trained parameters in float32.
        steps: of the whole run.
        done: of them, by the checkpoint that the run would go on from.
        not_finite: of the rehearsed steps, how many had a gradient that was not finite.
        replaced: images that did not decode.
        survey: images that the method wants to see before its first step, which is left out here.
    """

    images: int
    step_s: float
    wait_s: float
    first_s: float
    decode_images_s: float
    resident_bytes: int
    peak_bytes: int | None
    device_bytes: int | None
    checkpoint_bytes: int
    gradient_bytes: int
    steps: int
    done: int
    not_finite: int
    replaced: int
    survey: int


@dataclass(frozen=True)
class RankReport:
    """One process.

    Attributes:
        stage: what it did last.
        error: what ended it; None where it came to its end.
        consequence: another process's end is the cause.
        lost: its host does not answer any more, and so nothing is known of it.
        all_reduce_right, all_gather_right: whether the values were; None where it was not tried.
    """

    rank: int
    host: str
    stage: str = "starting"
    error: str | None = None
    consequence: bool = False
    lost: bool = False
    all_reduce_right: bool | None = None
    all_gather_right: bool | None = None
    all_reduce: Moved | None = None
    all_gather: Moved | None = None
    links: tuple[Link, ...] = ()
    rehearsed: Rehearsed | None = None
