"""Read a shard with the libraries that training uses: webdataset and NVIDIA DALI, each in a process of its own.

DALI is C++ and may crash on what it does not expect, and webdataset loads torch where there is one. So this file is
also a program: it reads requests from its input, a JSON line each, and answers each with a line. It imports nothing of
data_prep, for it runs as a plain file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

READERS = {"webdataset": "webdataset", "dali": "DALI"}
_MODULES = {"webdataset": "webdataset", "dali": "nvidia.dali"}
START_LIMIT = 180.0  # seconds to import; a cold file system is slow
READ_LIMIT = 120.0  # seconds for a shard, and as long again for every GB
_READY = "ready"

# Of a sample: its image's member name, and xxh3_64 of image and record.
Read = tuple[str, str, str]


class NotLoaded(Exception):
    """The library is there and cannot be imported."""


class ReaderFailed(Exception):
    """The library could not read the shard; the message says how it ended."""


def hashed(data: bytes) -> str:
    """What is compared of a member's bytes."""
    return xxhash.xxh3_64_hexdigest(data)


def installed(reader: str) -> bool:
    """Whether the library is there; it is not loaded."""
    try:
        return importlib.util.find_spec(_MODULES[reader]) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def command(reader: str) -> list[str]:
    """Start this file as a program; -P keeps data_prep's file names from standing for other modules."""
    return [sys.executable, "-P", __file__, reader]


class _Child:
    """One library in a process; it ends when its input does, so it never outlives its parent."""

    def __init__(self, reader: str) -> None:
        self._process = subprocess.Popen(
            command(reader), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._rest = b""
        try:
            ready = self._line(START_LIMIT)
        except ReaderFailed as failure:
            self.close()
            raise NotLoaded(str(failure)) from None
        assert ready == _READY, ready

    def ask(self, request: dict[str, str], limit: float) -> list[Read]:
        """Raises ReaderFailed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; why is found when its answer is read
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return [tuple(entry) for entry in json.loads(self._line(limit))]

    def _line(self, limit: float) -> str:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        deadline = time.monotonic() + limit
        parts = []
        while True:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ReaderFailed(f"gave no answer in {limit:.0f} s")
            piece = os.read(handle, 1 << 16)
            if not piece:
                code = self._process.wait()
                raise ReaderFailed(f"crashed with signal {-code}" if code < 0 else f"ended with code {code}")
            parts.append(piece)
            if piece.endswith(b"\n"):  # there is one answer to one request
                return b"".join(parts).decode().rstrip("\n")

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


_children: dict[str, _Child] = {}


def read_shard(reader: str, tar: Path, idx: Path) -> list[Read]:
    """The samples of a shard as a library gives them, in its order.

    The library's process stays for the next shard; `close` ends it.

    Raises:
        NotLoaded: the library cannot be imported here.
        ReaderFailed: it raised an error, crashed or hung.
    """
    if reader not in _children:
        _children[reader] = _Child(reader)
    limit = READ_LIMIT * (1 + tar.stat().st_size / 1e9)
    try:
        return _children[reader].ask({"tar": os.path.abspath(tar), "idx": os.path.abspath(idx)}, limit)
    except ReaderFailed:
        _children.pop(reader).close()
        raise


def close() -> None:
    """End the processes of this one."""
    while _children:
        _children.popitem()[1].close()


# What runs in the process of its own


def _by_webdataset(tar: str, idx: str) -> Iterator[Read]:
    import webdataset

    # A bare file name: a folder may hold what webdataset takes for a pattern or a pipe.
    os.chdir(os.path.dirname(tar))
    for sample in webdataset.WebDataset([os.path.basename(tar)], shardshuffle=False):
        extension = next(name for name in ("jpg", "png") if name in sample)
        yield f"{sample['__key__']}.{extension}", hashed(sample[extension]), hashed(sample["json"])


def _by_dali(tar: str, idx: str) -> Iterator[Read]:
    import nvidia.dali.fn as fn
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        read: Any = fn.readers.webdataset
        image, record = read(
            paths=[tar], index_paths=[idx], ext=["jpg;png", "json"], missing_component_behavior="error", name="reader"
        )
        pipeline.set_outputs(image, record)
    pipeline.build()
    for _ in range(pipeline.reader_meta("reader")["epoch_size"]):
        image, record = pipeline.run()
        name = image[0].source_info().rpartition(":")[2]  # TAR:OFFSET:NAME
        yield name, hashed(bytes(image.at(0))), hashed(bytes(record.at(0)))


def _serve(reader: str, requests: IO[str], answers: IO[str]) -> None:
    """Whatever is raised here ends the process, and that is the answer."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset does without, and it takes seconds to load
    importlib.import_module(_MODULES[reader])
    read = {"webdataset": _by_webdataset, "dali": _by_dali}[reader]
    print(_READY, file=answers, flush=True)
    for line in requests:
        print(json.dumps(list(read(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    # Libraries print; the answers must stay clean.
    clean = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.argv[1], sys.stdin, clean)
