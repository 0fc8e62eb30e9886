"""What a run's exit code says, for batch scripts and for torchrun; printed by `medpretrain train --help`."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `medpretrain train`, with their meanings.

    >>> Exit.PREEMPTED.value, Exit.PREEMPTED.meaning
    (75, 'asked to leave by a signal: the checkpoint is committed, start again to go on')
    """

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "all steps are done"
    FAILED = 1, "the run failed; the last line says why and how to resume"
    USER_ERROR = 2, "a recipe, folder or option cannot be used; the same command would fail again"
    # TEMPFAIL of sysexits.h: trying again helps.
    PREEMPTED = 75, "asked to leave by a signal: the checkpoint is committed, start again to go on"
    NO_PROGRESS = 76, "restarted several times without a step forward; only a start by hand goes on"
    HANG = 77, "no progress for faults.hang_s seconds; the last line names the rank"


def exit_codes() -> str:
    """One sentence, for a help text."""
    return "Exit codes: " + "; ".join(f"{code.value}: {code.meaning}" for code in Exit) + "."
