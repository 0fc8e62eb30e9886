"""TensorBoard's event files in RUN/tensorboard, for who asks for them: `tracking.tensorboard=true`."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from medpretrain.tracking.follow import START, Follower
from medpretrain.tracking.state import write_whole

TENSORBOARD_FOLDER = "tensorboard"

_log = logging.getLogger(__name__)


def refuse_without_tensorboard() -> None:
    """Check that the package is there, without importing it.

    Raises:
        UserError: it is not; the extra that brings it is named.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tracking.tensorboard=true needs the package tensorboard, of the extra `tensorboard`: "
            'pip install "medpretrain[train,tensorboard]"'
        )


class TensorBoardWriter:
    """Follows a run's metrics.jsonl with event files, from a thread of its own; for rank 0 alone.

    A resumed run goes on where the files end. Steps that are measured again after a rollback, or that may have been
    written by a killed process, are purged (TensorBoard then shows them once) and written anew.

    Args:
        run: the run folder.
        interval_s: seconds between two looks at the metrics.
    """

    def __init__(self, run: Path, interval_s: float = 5.0) -> None:
        self._folder = run / TENSORBOARD_FOLDER
        self._file = self._folder / "position.json"
        self._metrics = run / "metrics.jsonl"
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Write what is left and close the files; a warning if that takes longer than `timeout_s`."""
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("TensorBoard's files in %s lack the last rows; %s has them", self._folder, self._metrics)

    def _work(self) -> None:
        try:
            self._follow()
        except (OSError, ImportError, UserError) as error:
            _log.warning("no more rows are written to %s (%s); %s has them", self._folder, error, self._metrics)

    def _follow(self) -> None:
        follower = self._where_files_end()
        writer: Any = None
        while True:
            last = self._closing.is_set()
            while rows := follower.rows():
                if writer is None or follower.rewound_to is not None:
                    if writer is not None:
                        writer.close()
                    writer = self._open(follower.position[0])
                    follower.rewound_to = None
                for placed in rows:
                    for point in follower.points(placed):
                        writer.add_scalar(point.name, point.value, point.step, walltime=placed[1].get("time"))
                follower.position = rows[-1][0]
                writer.flush()
                state = {"step": follower.position[0], "rollbacks_read": follower.rollbacks_read}
                write_whole(self._file, json.dumps(state))
            if last:
                if writer is not None:
                    writer.close()
                return
            self._closing.wait(self._interval_s)

    def _where_files_end(self) -> Follower:
        """Reading starts at the first row of the last step that was written: some rows of it may be lacking."""
        if not self._file.exists():
            return Follower(self._metrics, START)
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return Follower(self._metrics, (int(found["step"]), 0), int(found["rollbacks_read"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._file} is broken ({error}); move it away, and all rows are written again") from None

    def _open(self, purge_from: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # here, since it takes seconds

        # A purge at the very start of a new folder would be noise; of an old one it hides what is written again.
        return SummaryWriter(str(self._folder), purge_step=max(purge_from, 0) if any(self._events()) else None)

    def _events(self) -> list[Path]:
        return list(self._folder.glob("events.out.tfevents.*"))
