"""Runs a command on a host, and asks it to leave when this is signalled or, over ssh, when the launching side is gone.

`python -m launchers.on_host [--over-ssh] WORD ...` ends with the command's exit code. Without a terminal sshd signals
nobody when a connection ends; standard input comes to its end, and that is what `--over-ssh` watches.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

RANKS = "deepspeed.launcher.launch"
"""DeepSpeed's module that starts the ranks of a host."""
OVER_SSH = "--over-ssh"
LEAVE_S = 600
"""How long processes that were asked to leave may write their checkpoint."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that grows with every signal to leave; those that were ignored before still are."""
    noted: list[int] = []
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda received, _: noted.append(received))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(words: Sequence[str], over_ssh: bool) -> int:
    """The command's exit code; when this returns, nothing that it started in its session is left."""
    with noted_signals() as asked:
        said = subprocess.PIPE if over_ssh else None
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        relays = [
            threading.Thread(target=_relay, args=(source.fileno(), to), daemon=True)
            for source, to in ((process.stdout, 1), (process.stderr, 2))
            if source is not None
        ]
        for relay in relays:
            relay.start()
        while process.poll() is None and not asked and not (over_ssh and _input_ended()):
            time.sleep(0.1)
        if process.poll() is None:
            _ask_to_leave(process)
            deadline = time.monotonic() + LEAVE_S
            while process.poll() is None and time.monotonic() < deadline and asked.count(signal.SIGINT) < 2:
                time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for relay in relays:
            relay.join(timeout=5)
        return code if code >= 0 else 128 - code


def _ask_to_leave(process: subprocess.Popen[bytes]) -> None:
    """DeepSpeed would give its ranks 30 s and end with 1; asked themselves they commit, and it ends with their 75."""
    import psutil  # a login node that has no such package launches too

    assert isinstance(process.args, list)
    with contextlib.suppress(psutil.NoSuchProcess):
        itself = psutil.Process(process.pid)
        for asked in (RANKS in process.args and itself.children()) or [itself]:
            with contextlib.suppress(psutil.NoSuchProcess):
                asked.send_signal(signal.SIGTERM)


def _input_ended() -> bool:
    readable, _, _ = select.select([0], [], [], 0)
    return bool(readable) and not os.read(0, 4096)


def _relay(source: int, to: int) -> None:
    """Where nobody listens any more, go on reading: a rank must not fail at a print while it commits."""
    while said := os.read(source, 65536):
        with contextlib.suppress(OSError):
            while said:
                said = said[os.write(to, said) :]


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    sys.exit(run(rest, over_ssh=True) if first == OVER_SSH else run([first, *rest], over_ssh=False))
