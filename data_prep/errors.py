"""The errors a user sees, and the nearest right name to put into one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what would be right.

    The command line prints the message alone and exits with code 2.
    """

    exit_code = 2


class WorkFailed(RuntimeError):
    """Work that was asked for rightly cannot be ended; the message names the cause and what to do.

    The command line prints the message alone and exits with code 1, or with that of a kind of its own.
    """

    exit_code = 1


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint to end an error message with.

    >>> nearest("resnet81", ["resnet18", "vit_small"])
    "; did you mean 'resnet18'?"
    >>> nearest("x", ["one", "two"])
    "; it can be 'one', 'two'"
    """
    listed = list(choices)
    close = difflib.get_close_matches(name, listed, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not listed:
        return ""
    shown = ", ".join(repr(choice) for choice in listed[:12])
    return f"; it can be {shown}" + (", ..." if len(listed) > 12 else "")
