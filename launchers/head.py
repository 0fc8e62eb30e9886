"""The host where all of a run meet, and the port."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from data_prep.errors import UserError


@dataclass(frozen=True)
class Head:
    """
    >>> str(Head("gpu01", 29400)), str(Head("gpu01", 29400).preflight)
    ('gpu01:29400', 'gpu01:29399')
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, port: int | None = None) -> Head:
        """
        >>> Head.parse("gpu01:30000"), Head.parse("[::1]:80"), Head.parse("gpu01", 29400)
        (Head(host='gpu01', port=30000), Head(host='::1', port=80), Head(host='gpu01', port=29400))

        Args:
            port: where `text` has none; without it, it must have one.

        Raises:
            UserError: not HOST:PORT.
        """
        host, colon, given = text.rpartition(":")
        if not colon and text and port is not None:
            return cls(text, port)
        if not host or not given.isdecimal() or not 1 < int(given) < 65536:
            form = "HOST:PORT, as in node1:29400" if port is None else "HOST or HOST:PORT"
            raise UserError(f"--head {text}: give {form}")
        return cls(host.strip("[]"), int(given))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def preflight(self) -> Head:
        """Where a preflight meets: one port below."""
        return Head(self.host, self.port - 1)

    def refuse_unknown(self) -> None:
        """
        Raises:
            UserError: the name does not resolve here; torchrun would end with a traceback.
        """
        try:
            socket.getaddrinfo(self.host, self.port)
        except socket.gaierror as error:
            raise UserError(f"--head {self.host}: this host cannot resolve the name ({error.strerror})") from None

    def address_here(self) -> str | None:
        """This host's own address on the way there; None where there is no way, or where it is loopback."""
        try:
            family, _, _, _, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)  # chooses a route, and sends nothing
                own = str(probe.getsockname()[0])
        except OSError:
            return None
        return None if is_loopback(own) else own


def is_loopback(address: str) -> bool:
    """
    >>> is_loopback("127.0.1.1"), is_loopback("::1"), is_loopback("10.0.0.1")
    (True, True, False)
    """
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
