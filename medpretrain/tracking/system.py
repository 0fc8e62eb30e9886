"""What a run takes of its machine, as columns of a row of metrics."""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

_GIB = 2**30


def system_metrics(run: Path) -> dict[str, float]:
    """CPU, memory, disk and GPU, cheap enough for every logged step; for rank 0, of its own process and device.

    Args:
        run: the run folder.

    Returns:
        `system/cpu_percent`: of this process since the call before, 100 for one busy core (0 at the first call);
        `system/memory_gib`: resident memory of this process; `system/disk_free_gib`: of the run folder's disk. On CUDA
        `system/gpu_memory_gib`: of the device, by all processes; and `system/gpu_utilisation` (percent) if
        nvidia-ml-py is installed, which torch asks.

    Raises:
        OSError: the run folder is gone.
    """
    process = _process()
    measured = {
        "system/cpu_percent": float(process.cpu_percent()),
        "system/memory_gib": process.memory_info().rss / _GIB,
        "system/disk_free_gib": shutil.disk_usage(run).free / _GIB,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        measured["system/gpu_memory_gib"] = (total - free) / _GIB
        if _has_nvml():
            measured["system/gpu_utilisation"] = float(torch.cuda.utilization())
    return measured


@cache
def _process() -> Any:
    import psutil

    return psutil.Process()


@cache
def _has_nvml() -> bool:
    import torch

    try:
        torch.cuda.utilization()
    except (ModuleNotFoundError, RuntimeError):
        return False  # torch asks NVML through nvidia-ml-py, which is not among our packages
    return True
