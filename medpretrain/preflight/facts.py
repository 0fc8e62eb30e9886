"""What a host knows of itself, found without a word to any other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data_prep
import launchers
import medpretrain
from medpretrain.health.address import gloo_address, interfaces
from medpretrain.preflight.data import DatasetSeen, look_at_dataset
from medpretrain.preflight.patience import answered
from medpretrain.preflight.target import TargetSeen, look_at_target, target_folder
from medpretrain.recipe import Recipe, flatten

REQUIRED = ("medpretrain", "numpy", "torch", "torchvision", "timm", "nvidia-dali")
"""Packages without which nothing trains. Which build of DALI is there, `nvidia-dali-cuda130` say, is part of its
version."""
PACKAGES = (*REQUIRED, "deepspeed", "webdataset", "pyarrow", "pydantic", "safetensors", "triton", "nvidia-nccl")
_BUILDS = re.compile(r"(nvidia-dali|nvidia-nccl)(-(?:cuda|cu)\d+)")
_DRIVER = Path("/proc/driver/nvidia/version")
_CGROUP, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
STUCK_S = 300.0


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes: int


@dataclass(frozen=True)
class HostFacts:
    """A host before anything was tried together.

    Attributes:
        name: by which the host checked in.
        processes: that train there.
        versions: of Python and PACKAGES; None where a package is not installed.
        code: SHA-256 of the source files of medpretrain, data_prep and launchers: one version may have two contents.
        recipe: every value of the resolved recipe by its dotted key.
        gpus: those that torch sees.
        gpu_problem: what torch said where it could not look at them.
        driver: NVIDIA's, None where there is none.
        memory: bytes that the host, or the container, has.
        shared_memory: bytes of /dev/shm, through which processes of one host talk; None where there is none.
        network: which machine's, and which of its namespaces; hosts that share one reach each other by loopback.
        gloo_address: where gloo listens; None where GLOO_SOCKET_IFNAME says it.
        interfaces: of the network, without loopback.
    """

    name: str
    processes: int
    versions: dict[str, str | None]
    code: str
    recipe: dict[str, str | int | float | bool | None]
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    driver: str | None
    cores: int
    memory: int
    shared_memory: int | None
    network: str
    gloo_address: str | None
    interfaces: tuple[str, ...]
    target: TargetSeen
    datasets: tuple[DatasetSeen, ...]


def look(
    recipe: Recipe,
    name: str,
    *,
    gpus: int | None,
    verify_shards: int | None,
    stuck_s: float = STUCK_S,
    on_progress: Callable[[str], None] = lambda doing: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> HostFacts:
    """This host.

    Args:
        gpus: processes that are to train here; None: one for each GPU, or one where there is none or device=cpu.
        verify_shards: of how many shards of each dataset the SHA-256 is computed; None: of all.
        stuck_s: after which a file system that does not get on is given up.
        on_progress: told what is being looked at.
        meanwhile: called every second while files are looked at.
    """
    on_progress("packages and GPUs")
    there, gpu_problem = ((), None) if recipe.device == "cpu" else _gpus()
    on_progress("the checkpoint target")
    silent = f"gives no answer for {stuck_s:.0f} s: is the server of its file system away?"
    try:
        target = answered(lambda: look_at_target(recipe), stuck_s, meanwhile=meanwhile)
    except TimeoutError:
        target = TargetSeen(str(recipe.checkpoint.to or target_folder(recipe)), problem=silent)
    datasets = []
    for path in recipe.data.path:
        on_progress(f"dataset {path}")
        read: list[str] = []
        look_at_it = partial(look_at_dataset, path, host=name, shards=verify_shards, on_file=read.append)
        try:
            datasets.append(answered(look_at_it, stuck_s, signs=read.__len__, meanwhile=meanwhile))
        except TimeoutError:
            datasets.append(DatasetSeen(path, problem=f"{path} {silent}"))
    return HostFacts(
        name=name,
        processes=gpus if gpus is not None else max(1, len(there)),
        versions=versions(),
        code=code_sha256(),
        recipe=dict(flatten(recipe.resolved())),
        gpus=there,
        gpu_problem=gpu_problem,
        driver=_driver(),
        cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        shared_memory=_shared_memory(),
        network=_network(),
        gloo_address=gloo_address(),
        interfaces=interfaces(),
        target=target,
        datasets=tuple(datasets),
    )


def versions() -> dict[str, str | None]:
    """Of Python and PACKAGES, as they would be imported; None for what is not installed.

    >>> versions()["python"].startswith("3.")
    True
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    builds: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        build = _BUILDS.fullmatch((distribution.name or "").lower())
        if build:
            builds.setdefault(build[1], f"{distribution.version}{build[2]}")
    for package in PACKAGES:
        try:
            found[package] = builds.get(package) or importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    # A checkout that stands before an installed one on the path has no metadata of its own.
    found["medpretrain"] = medpretrain.__version__
    return found


def code_sha256() -> str:
    """SHA-256 over names and contents of the Python files that this process runs of ours."""
    digest = hashlib.sha256()
    for package in (medpretrain, data_prep, launchers):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{package.__name__}/{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Those that torch sees, and what it said where it could not look: one that is broken is found here. None where
    torch is not installed, which `versions` tells."""
    try:
        import torch

        if not torch.cuda.is_available():
            return (), None
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    except ModuleNotFoundError:
        return (), None
    except (RuntimeError, ImportError, OSError) as error:  # a library that does not load, a GPU that fell off its bus
        return (), " ".join(str(error).split())[:500]
    return tuple(Gpu(one.name, one.total_memory) for one in found), None


def _driver() -> str | None:
    try:
        said = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", _DRIVER.read_text())
    except OSError:
        return None
    return said[0] if said else None


def _memory() -> int:
    """Of the machine, or the least that a cgroup on the way to this process leaves it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _cgroup_limits():
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)


def _cgroup_limits() -> Iterator[Path]:
    """Files that may hold a limit, of cgroups of both versions: SLURM's stand deep below the root."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, name = (_CGROUP, "memory.max") if not controllers else (_CGROUP / "memory", "memory.limit_in_bytes")
            for folder in (place := root / path.lstrip("/"), *place.parents):
                if folder.is_relative_to(root):
                    yield folder / name


def _network() -> str:
    try:
        return f"{_BOOT.read_text().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def _shared_memory() -> int | None:
    if sys.platform != "linux":
        return None
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return None
    return disk.f_blocks * disk.f_frsize
