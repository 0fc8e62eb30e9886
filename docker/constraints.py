"""The locked versions, but for what a base image brings for its GPU: that stays as it is.

    python3 constraints.py requirements.lock > constraints.txt

A base has its torch, torchvision, triton, CUDA and NVIDIA packages for its driver and its GPUs, built to fit each
other; one of them replaced breaks the rest. What it lacks comes in the locked version.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions

KEPT = re.compile(r"torch|torchvision|(?:pytorch-)?triton|(?:nvidia|cuda)-.+")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(lock: str, installed: dict[str, str]) -> list[str]:
    """Lines of a constraints file.

    Args:
        lock: the text of requirements.lock.
        installed: version by name, of the base.

    >>> constraints("nvtx==0.2.17\\n    # via nvidia-dali-cuda130\\ntorch==2.15.0\\n", {"torch": "2.11.0+cu130"})
    ['nvtx==0.2.17', 'torch==2.11.0+cu130']
    """
    kept = {_canonical(name): version for name, version in installed.items() if KEPT.fullmatch(_canonical(name))}
    lines = [line for line in lock.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    locked = [line for line in lines if _canonical(re.split(r"[=\s]", line, maxsplit=1)[0]) not in kept]
    return locked + [f"{name}=={version}" for name, version in sorted(kept.items())]


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print("\n".join(constraints(file.read(), {found.name: found.version for found in distributions()})))
