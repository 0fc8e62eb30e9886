"""`python -m medpretrain.preflight.worker FOLDER`: a process of the rehearsal; it outlives neither agent nor time.

That is seen to before torch is imported, which may take a minute where many processes start at a time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from pydantic import TypeAdapter

from medpretrain.preflight.workers import JOB_FILE, Work


def _end_with(agent: int) -> None:
    """An orphan would hold its GPU until its time is over."""
    while os.getppid() == agent:
        time.sleep(0.5)
    os._exit(1)


def main(folder: Path) -> int:
    work = TypeAdapter(Work).validate_json((folder / JOB_FILE).read_text())
    signal.alarm(int(work.limit_s) + 5)  # no handler of Python: the main thread may stand in a collective
    threading.Thread(target=_end_with, args=(work.agent,), daemon=True).start()
    from medpretrain.preflight.rehearsal import take_part

    return take_part(work, folder)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group that has lost a rank can hold up the interpreter's way out
