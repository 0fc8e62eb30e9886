"""One line on several hosts at once, by pdsh over ssh: if one fails, or this is asked to leave, all are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launchers.command import Command
from launchers.on_host import LEAVE_S, noted_signals

LIFELINE = "MEDPRETRAIN_LIFELINE"
CONNECT_S = 10
# For each host, here. ssh reads from a pipe that this process alone holds open: when it is closed, or this process is
# killed, `launchers.on_host` sees the end of its input, while what the hosts say on leaving still arrives.
_HERE = f"""\
if [ "${LIFELINE}" ]; then exec < "${LIFELINE}" || exit; fi
"$@" && exit
code=$?
if [ "${LIFELINE}" ]; then rm -f "${LIFELINE}"; fi
exit $code"""


def ssh(port: int | None = None) -> list[str]:
    """ssh that asks nothing, and misses a host that has fallen silent after three minutes."""
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=60"]
    words = ["ssh", "-a", "-x", *(word for option in options for word in ("-o", option))]
    return [*words, "-p", str(port)] if port else words


def verbatim(text: str) -> str:
    """`text` as pdsh, for which %h is a host's name and %n its place, takes it for itself.

    >>> verbatim("100%h")
    '100%%h'
    """
    return text.replace("%", "%%")


class Pdsh(Command):
    """`line`, in which %h is a host's name and %n its place, run on each host by the user's shell there."""

    def __init__(self, hosts: Sequence[str], line: str, ssh_port: int | None = None) -> None:
        # pdsh's own way over ssh would overrule the user name of ssh's configuration, and cannot keep a pipe open.
        words = ["pdsh", "-S", "-b", "-f", str(len(hosts)), "-R", "exec", "-w", ",".join(hosts)]
        super().__init__([*words, "sh", "-c", _HERE, "sh", *ssh(ssh_port), "%h", line])

    def run(self) -> int:
        """The largest exit code of all hosts, when all have ended."""
        sys.stdout.flush()
        with tempfile.TemporaryDirectory(prefix="medpretrain-") as folder, noted_signals() as asked:
            lifeline = Path(folder, "lifeline")
            os.mkfifo(lifeline)
            held = os.open(lifeline, os.O_RDWR)
            try:
                # A session of its own: Ctrl-C in the terminal is for this process.
                process = subprocess.Popen(
                    list(self.words),
                    stdin=subprocess.DEVNULL,
                    env=os.environ | self.environment | {LIFELINE: str(lifeline)},
                    start_new_session=True,
                )
                while process.poll() is None and not asked and lifeline.exists():
                    time.sleep(0.1)
                if process.poll() is None:
                    why = signal.Signals(asked[0]).name if asked else "a host has ended"
                    print(f"{why}: all hosts are asked to leave, and have {LEAVE_S} s", file=sys.stderr, flush=True)
            finally:
                lifeline.unlink(missing_ok=True)  # first: who comes now must not wait for someone to open it
                os.close(held)
            return process.wait()

    def become(self) -> NoReturn:
        """pdsh would leave the hosts to themselves when it is signalled, so this process stays."""
        sys.exit(self.run())
