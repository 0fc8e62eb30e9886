"""A process's share of a checkpoint, copied to host memory and from there into its file."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from medpretrain.checkpoints.manifest import CheckpointError
from medpretrain.checkpoints.parts import Layout
from medpretrain.checkpoints.target import write_all

_CHUNK = 1 << 25  # bytes; a power of two, for torch rounds pinned memory up to one

_log = logging.getLogger(__name__)


class Staging:
    """Host memory for one file's data, kept for the next save; pinned if the values come from CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._chunks: list[Tensor] = []
        self._used = 0

    def fill(self, layout: Layout) -> None:
        """Copy what `layout` holds; when it returns, the values may change.

        Raises:
            CheckpointError: the memory for it is not there.
        """
        size = sum(each.bytes for each in layout.slices)
        while len(self._chunks) * _CHUNK < size:
            self._chunks.append(self._chunk())
        self._used = 0
        for each in layout.slices:
            raw = each.raw()
            while len(raw):
                chunk, place = divmod(self._used, _CHUNK)
                now, raw = raw[: _CHUNK - place], raw[_CHUNK - place :]
                self._chunks[chunk][place : place + len(now)].copy_(now, non_blocking=self._pinned)
                self._used += len(now)
        if self._pinned:
            torch.cuda.current_stream(self._device).synchronize()

    def _chunk(self) -> Tensor:
        if self._pinned:
            try:
                return torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pinned = False
                _log.warning("checkpoints go through memory that is not pinned, which is slower: %s", error)
        try:
            return torch.empty(_CHUNK, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(f"there is no host memory to copy the checkpoint to: {error}") from error

    def data(self) -> Iterator[memoryview]:
        """The bytes, in chunks that are read-only in meaning."""
        for number, chunk in enumerate(self._chunks):
            length = min(_CHUNK, self._used - number * _CHUNK)
            if length <= 0:
                return
            whole = memoryview(chunk.numpy())  # type: ignore[arg-type]
            yield whole[:length]


@dataclass(frozen=True)
class Streamed:
    """What went into a file, and how long it took."""

    bytes: int
    sha256: str
    writing_s: float
    hashing_s: float
    """Seconds that the hash took longer than the file took to be on disk: what hashing costs."""


def stream(opened: AbstractContextManager[BinaryIO], header: bytes, staging: Staging) -> Streamed:
    """Write header and data to the file that `opened` gives and closes, and hash them in a second thread meanwhile."""
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(_sha256, header, staging)  # hashing and writing both let other threads run
        size = len(header)
        with opened as file:
            write_all(file, memoryview(header))
            for chunk in staging.data():
                write_all(file, chunk)
                size += len(chunk)
        wrote = time.perf_counter()  # and on disk
        return Streamed(size, hashed.result(), wrote - start, time.perf_counter() - wrote)


def _sha256(header: bytes, staging: Staging) -> str:
    digest = hashlib.sha256(header)
    for chunk in staging.data():
        digest.update(chunk)
    return digest.hexdigest()
