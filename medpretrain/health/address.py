"""Where this host listens for the others. Debian and Ubuntu give a host's own name the address 127.0.1.1, at which
nobody else finds it, and gloo, which every run of several processes uses, listens where the name says."""

from __future__ import annotations

import os
import socket

from launchers.head import is_loopback

LOOPBACK = "127.0.0.1"


def gloo_address() -> str | None:
    """The address that torch's gloo takes on this host: the first one of its own name that is this machine's, loopback
    where the name means nothing; None where GLOO_SOCKET_IFNAME names an interface."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return LOOPBACK
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((where[0], 0))
            except OSError:
                continue
        return str(where[0])
    return LOOPBACK


def interfaces() -> tuple[str, ...]:
    """The network interfaces by which others may reach this host."""
    return tuple(name for _, name in socket.if_nameindex() if name != "lo")


def meets_elsewhere(master: str) -> bool:
    """Whether the host where a run meets has an address that is not loopback, so that processes of other hosts come."""
    try:
        found = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return not all(is_loopback(str(where[0])) for *_, where in found)


def cure(names: tuple[str, ...]) -> str:
    """What to do about a host that others do not find.

    Args:
        names: its interfaces.
    """
    here = f"; it has {', '.join(names)}" if names else ""
    return f"give its own address in its /etc/hosts, or GLOO_SOCKET_IFNAME=INTERFACE in its environment{here}"
