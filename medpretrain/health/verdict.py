"""Who holds up a run: a pure function of the ranks' latest beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from medpretrain.health.heartbeat import Beat, Seen

Phase = Literal["start", "log", "save", "data", "survey", "step", "end"]
"""Where the main thread is. With `step` the number of steps done, this is the order in which a run meets them: what
follows a step counts it, then comes the next one's data."""

_ORDER = {phase: place for place, phase in enumerate(get_args(Phase))}
_COLLECTIVES = ("torch/distributed/", "torch/autograd/graph.py")  # gradients are reduced while autograd runs


@dataclass(frozen=True)
class Verdict:
    """Why nobody gets on."""

    cause: str
    culprits: tuple[Beat, ...] = ()
    """What was last heard of them."""


def judge(own: Beat, seen: Mapping[int, Seen], world: int, *, silent_s: float, unanswered_s: float) -> Verdict:
    """Name who holds up the run.

    Args:
        own: this rank's beat of now.
        seen: the other ranks', as far as they were ever heard.
        silent_s: from here on a rank counts as silent, and so does the store.
        unanswered_s: for how long the store has not answered.
    """
    idle = f"no progress for {own.idle_s:.0f} s"
    if world == 1:
        return Verdict(f"{idle} at {own.where}", (own,))
    beats = {rank: each.beat for rank, each in seen.items()}
    left = [beat for beat in beats.values() if beat.left]
    states = {rank: beat.process_state() for rank, beat in beats.items()}
    halted = [beats[rank] for rank, state in states.items() if state and not beats[rank].left]
    silent = [each.beat for each in seen.values() if each.silent_s >= silent_s and not each.beat.left]
    lost = sorted({beat.rank: beat for beat in halted + silent}.values(), key=lambda beat: beat.rank)
    if lost:
        named = [f"{beat.who} is {states[beat.rank] or 'silent'}, last at {beat.where}" for beat in lost]
        return Verdict(f"{idle}: {_listed(named)}", tuple(lost))
    if left:
        named = [f"{beat.who} left the run at {beat.where.split(',')[0]} ({beat.left})" for beat in left]
        return Verdict(f"{idle}: {_listed(named)}", tuple(left))
    missing = [rank for rank in range(world) if rank != own.rank and rank not in seen]
    if unanswered_s >= silent_s:
        host = [beats[0]] if 0 in beats else []
        named_host = f" of {host[0].host}" if host else ""
        return Verdict(f"{idle}: the store on rank 0's host{named_host} has not answered for {unanswered_s:.0f} s, so "
                       "rank 0, its torchrun or the network to it is gone", tuple(host))  # fmt: skip
    if missing:
        return Verdict(f"{idle}: nothing was ever heard of rank {', '.join(map(str, missing))}")
    everyone = sorted([own, *beats.values()], key=lambda beat: beat.rank)
    behind = _behind(everyone)
    if behind:
        front = max(everyone, key=_position)
        named = [f"{beat.who} is still at {beat.where}" for beat in behind]
        return Verdict(f"{idle}: {_listed(named)}, while others are at step {front.step}, {front.phase}", tuple(behind))
    elsewhere = [beat for beat in everyone if beat.stack and not _waits_for_others(beat)]
    if elsewhere and len(elsewhere) < world:
        named = [f"{beat.who} is at {beat.where}" for beat in elsewhere]
        return Verdict(f"{idle}: {_listed(named)}, while the others wait for it in a collective", tuple(elsewhere))
    return Verdict(f"{idle}: all {world} ranks stand at {own.where}; the network or a device does not answer")


def _position(beat: Beat) -> tuple[int, int]:
    return beat.step, _ORDER[beat.phase]


def _behind(beats: list[Beat]) -> list[Beat]:
    front = max(map(_position, beats))
    return [beat for beat in beats if _position(beat) < front]


def _waits_for_others(beat: Beat) -> bool:
    return any(place in beat.stack[-1] for place in _COLLECTIVES)


def _listed(named: list[str], limit: int = 4) -> str:
    return "; ".join(named[:limit]) + (f"; and {len(named) - limit} more" if len(named) > limit else "")
