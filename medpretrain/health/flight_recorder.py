"""NCCL's record of the last collectives of each rank, written where a run hangs."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

_PREFIX = "nccl_trace_rank_"
_ENTRIES = "2000"


def enable_flight_recorder(folder: Path) -> None:
    """Have NCCL keep its last 2000 collectives and write them to `folder` when one times out; before the group is made.

    What the environment sets already stays. Both generations of names are set, for which of them a torch reads depends
    on its version. `torchfrtrace folder` reads the files.
    """
    wanted = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): _ENTRIES,
        ("TORCH_FR_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT"): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(folder.absolute() / _PREFIX),
    }
    for names, value in wanted.items():
        if not any(name in os.environ for name in names):
            os.environ.update(dict.fromkeys(names, value))


def dump_flight_recorder(rank: int) -> Path | None:
    """Write this rank's record now, where NCCL would; None without `enable_flight_recorder` or a group of NCCL's."""
    prefix = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    if prefix is None or not dist.is_initialized() or dist.get_backend() != "nccl":
        return None
    record: bytes = _distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
    path = Path(f"{prefix}{rank}")
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(record)
    os.replace(temporary, path)
    return path
