"""What is the same for every job of a cluster, in one YAML file: partition, image, mounts, environment."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from launchers.passwords import SHOWN, without_passwords

SECRET_NAMES = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|(?:API|ACCESS|ACCOUNT|PRIVATE)_?KEY", re.IGNORECASE)
"""Variables whose values are never shown."""

SHARED_MEMORY = "/dev/shm"
RECIPE_FOLDER = "/etc/medpretrain"
"""Where a recipe that is a file here appears in the pods."""

Count = Annotated[int, Ge(1)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if SECRET_NAMES.search(name):
        raise ValueError(
            f"{name} looks like a secret, and scripts and manifests would show it; export it in your shell"
        )
    return name


def _without_password(text: str) -> str:
    if without_passwords(text) != text:
        raise ValueError(SHOWN)
    return text


def _mount(text: str) -> str:
    """As Kubernetes takes it, and without what would tell it apart from the same path written otherwise."""
    if not text.startswith("/") or ":" in text or ".." in text.split("/"):
        raise ValueError(f"{text!r} is no place for a volume: give an absolute path, without .. and colons")
    path = posixpath.normpath("/" + text.lstrip("/"))
    if path == "/" or any(f"{path}/".startswith(f"{ours}/") for ours in (SHARED_MEMORY, RECIPE_FOLDER)):
        raise ValueError(f"{path} is taken in a pod; mount the volume elsewhere, as in /runs")
    return path


Shown = Annotated[str, AfterValidator(_without_password)]
"""Text that stands in scripts and manifests."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Slurm(_Section):
    """Of `launch slurm`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """As sbatch takes it: 2-00:00:00."""
    signal_s: Count = 300
    """Seconds before the time limit at which the run is asked to commit a checkpoint and leave."""
    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How the cluster is asked for GPUs: --gpus-per-node=N, --gres=gpu:N, or not at all (whole nodes, CPUs)."""
    container: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs `image`: srun --container-image, or apptainer exec."""
    extra: tuple[str, ...] = ()
    """Further lines of #SBATCH, as in --constraint=h100."""


class Volume(_Section):
    claim: str
    """A PersistentVolumeClaim."""
    path: Annotated[str, AfterValidator(_mount)]
    """Where it appears."""
    read_only: bool = False


class Kubernetes(_Section):
    """Of `launch kubernetes`."""

    namespace: str = "default"
    runtime: str = "torch-distributed"
    """A ClusterTrainingRuntime of Kubeflow Trainer."""
    queue: str | None = None
    """A LocalQueue of Kueue."""
    volumes: tuple[Volume, ...] = ()
    shared_memory: str = "32Gi"
    grace_s: Count = 600
    """Seconds between the request to leave and the kill: longer than a checkpoint takes."""
    gpu: str = "nvidia.com/gpu"
    """What a GPU is called among the resources."""
    node_selector: dict[str, str] = {}
    pull_secret: str | None = None

    @field_validator("volumes")
    @classmethod
    def _a_path_each(cls, volumes: tuple[Volume, ...]) -> tuple[Volume, ...]:
        seen: set[str] = set()
        for number, volume in enumerate(volumes):
            if volume.path in seen:
                problem = PydanticCustomError("path_twice", "two volumes are at the same path; give each its own")
                where = InitErrorDetails(type=problem, loc=(number, "path"), input=volume.path)
                raise ValidationError.from_exception_data(cls.__name__, [where])
            seen.add(volume.path)
        return volumes


class Site(_Section):
    """Defaults of a cluster; options of the command line come before them."""

    gpus: Count | None = None
    """Processes, and so GPUs, on each node."""
    cpus: Count | None = None
    """Cores of a node that a job takes."""
    image: str | None = None
    """A container image, or a .sqsh or .sif file; without one the environment of this Python is used."""
    mounts: tuple[str, ...] = ()
    """Of a SLURM container: /data:/data or /data:/data:ro."""
    environment: dict[Annotated[str, AfterValidator(_variable)], Shown] = {}
    """Of every process. A name that looks like a secret is refused, and a URL with a password: scripts and manifests
    show what is here."""
    setup: tuple[Shown, ...] = ()
    """Shell lines that come first on every node: module load cuda."""
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()
