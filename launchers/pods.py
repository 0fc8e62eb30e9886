"""What runs in a pod, and what the pod has: the shell script, variables, volumes, resources, rights."""

from __future__ import annotations

import posixpath
import re
import shlex
from pathlib import PurePosixPath
from typing import Any

from data_prep.errors import UserError
from launchers.job import PYTHON, Job, PrepJob
from launchers.site import RECIPE_FOLDER, SHARED_MEMORY, Site, Volume
from launchers.torchrun import PORT

Manifest = dict[str, Any]

PREFLIGHT_PORT, TORCHRUN_PORT = PORT - 1, PORT
WORKER_RESTARTS = 3
"""How often torchrun starts the processes again before the pods end."""

PATIENCE_S = 900
"""How long a pod waits for the others: images are pulled at different speeds, nodes may have to be started first, and
each attempt in vain counts as a restart."""

CONTAINER = "node"
"""Kubeflow Trainer looks for a container, and a replicated job, of this name."""

USER = 10001
"""User and group of the processes; a number, for without one the kubelet cannot tell that it is not root."""

SECRET_KEYS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""What a TrainJob takes from a secret: its API has no way to take all of it."""

_LEAST_GRACE_S = 10
_RESERVED = re.compile(r"PET_|POD_IP$|JOB_COMPLETION_INDEX$|JOBSET_RESTART_ATTEMPT$")


def train_script(job: Job, site: Site, name: str, preflight: bool) -> str:
    """The shell script of a pod of a run; it expects torchrun's PET_* variables and POD_IP."""
    lines = ["set -e", *site.setup]
    # The first process of a container ignores every signal it has no trap for.
    lines += ["trap 'exit 143' TERM INT", _WAIT_FOR_NAME]
    if preflight:
        words = shlex.join([PYTHON, "-m", "medpretrain", *job.preflight])
        lines.append(_GATE.format(preflight=words, port=PREFLIGHT_PORT, timeout=PATIENCE_S))
    lines.append(_TORCHRUN.format(name=shlex.quote(name), restarts=WORKER_RESTARTS, port=TORCHRUN_PORT))
    return "\n".join(lines) + f" \\\n  -m medpretrain {shlex.join(job.train_under_torchrun)}\n"


# A pod's name is known some seconds after the pod is there, and torchrun ends at a name that does not resolve.
_WAIT_FOR_NAME = f"""\
tries=0
until getent hosts "$PET_MASTER_ADDR" > /dev/null; do
  tries=$((tries + 1))
  if [ "$tries" -ge {PATIENCE_S} ]; then
    echo "$PET_MASTER_ADDR, the first pod, has had no address for {PATIENCE_S // 60} minutes" >&2
    exit 1
  fi
  sleep 1
done"""

# The others go through the gate only when all pods start; a container that starts again in its pod would wait in vain.
# Names of their own, for one that is missing may never have had an address, and is named all the same.
_GATE = """\
if [ ! -e /dev/shm/preflight-passed ]; then
  {preflight} \\
    --nodes "$PET_NNODES" --gpus "$PET_NPROC_PER_NODE" --head "$PET_MASTER_ADDR:{port}" --timeout {timeout} \\
    --name "node-$PET_NODE_RANK" --hosts "$(seq -s , -f node-%g 0 "$((PET_NNODES - 1))")" &
  gate=$!
  trap 'kill -TERM "$gate" || :; wait "$gate" || :; exit 143' TERM INT
  wait "$gate"
  : > /dev/shm/preflight-passed
fi"""

# Whose pod hosts the rendezvous is said, not guessed from names; --local-addr, for names of pods come late.
_TORCHRUN = """\
host=false
if [ "$PET_NODE_RANK" = 0 ]; then host=true; fi
exec torchrun --nnodes "$PET_NNODES" --nproc-per-node "$PET_NPROC_PER_NODE" --max-restarts {restarts} \\
  --rdzv-backend c10d --rdzv-id {name} --rdzv-endpoint "$PET_MASTER_ADDR:{port}" --rdzv-conf "is_host=$host" \\
  --local-addr "$POD_IP\""""


def prep_script(prep: PrepJob, site: Site) -> str:
    """The shell script of the pod that prepares part JOB_COMPLETION_INDEX + 1."""
    words = shlex.join([PYTHON, "-m", "medpretrain", "prep", *prep.words])
    part = f'--part "$((JOB_COMPLETION_INDEX + 1))/{prep.parts}"'
    return "\n".join(["set -e", *site.setup, f"exec {words} {part}"]) + "\n"


def command(script: str) -> list[str]:
    """A container's command that runs `script`, which Kubernetes passes on unchanged."""
    return ["sh", "-c", verbatim(script)]


def verbatim(text: str) -> str:
    """`text` so that Kubernetes, which expands $(NAME) and takes $$ for $ in commands and variables, makes it `text`.

    >>> verbatim("$HOME $((1 + 1)) $$")
    '$HOME $$((1 + 1)) $$$'
    """
    return re.sub(r"\$(?=[$(])", "$$", text)


def environment(site: Site) -> list[Manifest]:
    """Variables of every pod of a run.

    Raises:
        UserError: the site sets a variable that the launch must set, or leaves torchrun no time to leave.
    """
    grace = site.kubernetes.grace_s
    if grace < _LEAST_GRACE_S:
        raise UserError(
            f"kubernetes.grace_s={grace} leaves no time for a checkpoint; it must be {_LEAST_GRACE_S} s or more"
        )
    values = {
        # torchrun kills its processes that long after SIGTERM, before the kubelet kills it; torch 2.11 takes 30 s.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace - max(2, min(30, grace // 10))),
        # Without it a restart of processes can hang.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return [
        *_plain(site, values),
        _field("POD_IP", "status.podIP"),
        # How often all pods were made anew.
        _field("JOBSET_RESTART_ATTEMPT", "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"),
    ]


def prep_environment(site: Site) -> list[Manifest]:
    """Variables of a pod that prepares data."""
    return _plain(site, {})


def jobset_environment(name: str, nodes: int, gpus: int) -> list[Manifest]:
    """The variables that Kubeflow Trainer would set."""
    values = {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(gpus),
        "PET_MASTER_ADDR": f"{name}-{CONTAINER}-0-0.{name}",
    }
    return [
        *({"name": key, "value": value} for key, value in values.items()),
        _field("PET_NODE_RANK", "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
    ]


def secret_environment(secret: str | None) -> list[Manifest]:
    """Variables from those of SECRET_KEYS that `secret` has."""
    if secret is None:
        return []
    return [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for key in SECRET_KEYS
    ]


def resources(site: Site, gpus: int) -> Manifest:
    """Of a container: whole GPUs, and cores that are asked for but not a limit.

    Requests name the GPUs too: where limits alone do, some versions of Kubeflow Trainer start one process a node.
    """
    requests: Manifest = {}
    limits: Manifest = {}
    if site.cpus:
        requests["cpu"] = str(site.cpus)
    if gpus and site.kubernetes.gpu:
        requests[site.kubernetes.gpu] = limits[site.kubernetes.gpu] = str(gpus)
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def volumes(site: Site, *, shared_memory: bool, recipe: str | None = None) -> tuple[list[Manifest], list[Manifest]]:
    """The volumes of a pod and where its container has them.

    Args:
        site: with its PersistentVolumeClaims.
        shared_memory: DALI's and torch's processes hand batches on there; a container's own has 64 MB.
        recipe: the ConfigMap with a recipe.
    """
    held: list[Manifest] = []
    mounts: list[Manifest] = []
    for claim in dict.fromkeys(volume.claim for volume in site.kubernetes.volumes):
        held.append({"name": f"claim-{len(held)}", "persistentVolumeClaim": {"claimName": claim}})
    names = {volume["persistentVolumeClaim"]["claimName"]: volume["name"] for volume in held}
    for volume in site.kubernetes.volumes:
        mount = {"name": names[volume.claim], "mountPath": volume.path}
        mounts.append(mount | ({"readOnly": True} if volume.read_only else {}))
    if shared_memory:
        size = site.kubernetes.shared_memory
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?([KMGT]i|[kMGT])?", size):
            raise UserError(f"kubernetes.shared_memory={size!r} is no quantity; 32Gi is one")
        held.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        mounts.append({"name": "shm", "mountPath": SHARED_MEMORY})
    if recipe is not None:
        held.append({"name": "recipe", "configMap": {"name": recipe}})
        mounts.append({"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True})
    return held, mounts


def placement(site: Site) -> Manifest:
    """The fields of a pod that a runtime patch may have too: where it may run, as whom, with which pull secret."""
    kubernetes = site.kubernetes
    spec: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # Millions of files of a dataset are not visited at each start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }
    if kubernetes.node_selector:
        spec["nodeSelector"] = dict(kubernetes.node_selector)
    if kubernetes.gpu:
        # Nodes with GPUs keep others away with a taint of this name; a node_selector may name just these.
        spec["tolerations"] = [{"key": kubernetes.gpu, "operator": "Exists", "effect": "NoSchedule"}]
    if kubernetes.pull_secret:
        spec["imagePullSecrets"] = [{"name": kubernetes.pull_secret}]
    return spec


def container_security() -> Manifest:
    """What the "restricted" Pod Security Standard asks of a container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


_NAME = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
# A first part without a dot or a port is no registry but a folder of the usual one, unless it is localhost.
_IMAGE = re.compile(
    r"(?:(?=localhost[:/]|[^/]*[.:])[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?/)?"
    rf"{_NAME}(?:/{_NAME})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)


def image_of(site: Site) -> str:
    """Raises:
    UserError: the site names no image, one that is a file, or none that a registry can have.
    """
    image = site.image
    if not image:
        raise UserError("pods need a container image: give `image:` in the site's file, as in registry/medpretrain:1.0")
    if image.endswith((".sqsh", ".sif")) or image.startswith((".", "/")):
        raise UserError(f"image: {image} is a file; Kubernetes takes those of a registry, as in registry/name:tag")
    if not _IMAGE.fullmatch(image):
        raise UserError(
            f"image: {image!r} is none that Kubernetes takes: REGISTRY[:PORT]/NAME[:TAG][@sha256:DIGEST], the name in "
            "small letters, as in registry.example:5000/imaging/medpretrain:1.0"
        )
    return image


def volume_of(path: str, site: Site) -> Volume | None:
    """The one on which a path of a pod is; of volumes inside each other the deepest, which is the one that is seen."""
    at = _normal(path)
    around = [volume for volume in site.kubernetes.volumes if at.is_relative_to(volume.path)]
    return max(around, key=lambda volume: len(PurePosixPath(volume.path).parts), default=None)


def refuse_lost(path: str, what: str, site: Site, *, beside: bool = False) -> None:
    """
    Args:
        beside: something is written into the folder above it too.

    Raises:
        UserError: what is written to `path` would be gone with its pod.
    """
    if "://" in path:
        return
    volume = volume_of(path, site)
    if volume is None:
        raise UserError(f"{what} {path} is on no volume and would be gone with its pod; {_held(site)}")
    if volume.read_only:
        raise UserError(f"{what} {path} is on the volume {volume.claim}, which kubernetes.volumes has as read_only")
    if beside and _normal(path) == PurePosixPath(volume.path):
        raise UserError(
            f"{what} {path} is where the volume {volume.claim} is mounted, and is moved into place when it is whole; "
            f"give a folder inside it, as in {volume.path}/dataset"
        )


def refuse_unseen(path: str, what: str, site: Site) -> None:
    """Raises:
    UserError: `path`, which is read, is on no volume.
    """
    if volume_of(path, site) is None:
        raise UserError(f"{what} {path} is on no volume, and pods would not find it; {_held(site)}")


def _normal(path: str) -> PurePosixPath:
    """Without the `..` that would lead out of a volume."""
    return PurePosixPath(posixpath.normpath(re.sub(r"^/+", "/", path)))


def _held(site: Site) -> str:
    held = ", ".join(volume.path for volume in site.kubernetes.volumes) or "none"
    return f"kubernetes.volumes of the site's file has: {held}"


def _plain(site: Site, values: dict[str, str]) -> list[Manifest]:
    for key in site.environment:
        if _RESERVED.match(key):
            raise UserError(f"environment: {key} is set by the launch; take it out of the site's file")
    merged = values | site.environment
    return [{"name": key, "value": verbatim(value)} for key, value in merged.items()]


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
