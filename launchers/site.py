"""What is the same for every job of a cluster, in one YAML file: partition, image, mounts, environment."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import AfterValidator, BaseModel, ConfigDict

SECRET_NAMES = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|(?:API|ACCESS|ACCOUNT|PRIVATE)_?KEY", re.IGNORECASE)
"""Variables whose values are never shown."""
Count = Annotated[int, Ge(1)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if SECRET_NAMES.search(name):
        raise ValueError(
            f"{name} looks like a secret, and scripts and manifests would show it; export it in your shell"
        )
    return name


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
    path: str
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
    environment: dict[Annotated[str, AfterValidator(_variable)], str] = {}
    """Of every process. A name that looks like a secret is refused: scripts and manifests show what is here."""
    setup: tuple[str, ...] = ()
    """Shell lines that come first on every node: module load cuda."""
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()
