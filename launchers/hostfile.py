"""DeepSpeed's hostfile: which hosts, with how many slots, and which of them take part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from data_prep.errors import UserError, nearest

Slots = dict[str, list[int]]
"""The slots of each host, in the order of the file."""

_LINE = re.compile(r"(?P<host>\w[\w.-]*)\s+slots=(?P<slots>\d+)")


def read_hostfile(path: Path) -> Slots:
    """A line a host, as in `gpu01 slots=8`; `#` begins a comment.

    Raises:
        UserError: no such file, no host in it, a line that does not read so, a host that stands there twice.
    """
    if not path.is_file():
        raise UserError(f"there is no hostfile {path}; give one with --hostfile: a line a host, as in `gpu01 slots=8`")
    found: Slots = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UserError(f"{path}:{number}: {text!r} is no host with its slots; it reads like `gpu01 slots=8`")
        host, slots = match["host"], int(match["slots"])
        if host in found:
            raise UserError(f"{path}:{number}: {host} stands there twice")
        if slots < 1:
            raise UserError(f"{path}:{number}: {host} has no slot; leave the line out")
        found[host] = list(range(slots))
    if not found:
        raise UserError(f"{path} names no host")
    return found


def selected(hosts: Mapping[str, list[int]], include: str = "", exclude: str = "") -> Slots:
    """The hosts and slots that take part, in DeepSpeed's notation: `gpu01@gpu02:0,2` is all of gpu01, two of gpu02.

    >>> hosts = {"a": [0, 1], "b": [0, 1]}
    >>> selected(hosts, include="b:1@a"), selected(hosts, exclude="a")
    ({'a': [0, 1], 'b': [1]}, {'b': [0, 1]})

    Raises:
        UserError: both are given, a host or slot that the hostfile lacks, a host twice, or nothing is left.
    """
    if include and exclude:
        raise UserError("give --include or --exclude, not both")
    named = _parse(include or exclude, hosts, "--include" if include else "--exclude")
    if include:
        left = {host: sorted(named[host]) for host in hosts if host in named}
    else:
        left = {host: [slot for slot in slots if slot not in named.get(host, ())] for host, slots in hosts.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise UserError("no host is left to train on")
    return left


def _parse(text: str, hosts: Mapping[str, list[int]], option: str) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for part in text.split("@") if text else ():
        host, colon, listed = part.partition(":")
        if not host:
            raise UserError(f"{option} {text}: a host's name is missing; hosts are parted by one @: gpu01@gpu02:0,2")
        if host in named:
            raise UserError(f"{option} {text}: {host} stands there twice; name its slots once, as in {host}:0,1")
        if host not in hosts:
            raise UserError(f"{option}: the hostfile has no host {host!r}{nearest(host, hosts)}")
        slots = [int(slot) if slot.isdecimal() else -1 for slot in listed.split(",")] if colon else hosts[host]
        for slot in slots:
            if slot not in hosts[host]:
                raise UserError(f"{option}: {part!r}: {host} has the slots 0 to {len(hosts[host]) - 1}")
        named[host] = set(slots)
    return named
