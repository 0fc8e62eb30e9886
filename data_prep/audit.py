"""An append-only log of what was done to a dataset: times, versions, counts and reasons, and no identifier."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.dataset import created_by


class Audit:
    """Appends to `path`, a JSON object a line; what an earlier run of the same OUT wrote comes first."""

    def __init__(self, path: Path, before: Path) -> None:
        self._path = path
        self._before = before

    def say(self, event: str, **facts: Any) -> None:
        """Add a line and flush it to disk. `facts` are counts, codes, hashes and options, never a name or a path."""
        if not self._path.exists() and self._before.exists():
            part = self._path.with_suffix(".part")  # on a full disk half a copy must not pass for the whole
            shutil.copyfile(self._before, part)
            part.rename(self._path)
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": time, "event": event, "tool": created_by(), **facts}, sort_keys=True)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
