"""Manifests for Kubernetes: a TrainJob and its runtime (Kubeflow Trainer v2), a JobSet, an indexed Job for data.

They are plain dictionaries; `kubectl.to_yaml` writes them and `kubectl.submit` sends them. Restarts: torchrun starts
lost processes again; where a pod fails or is lost, the JobSet makes all pods anew, so that all go through the preflight
together; what a user has to mend (exit code 2, of the preflight) ends it at once.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from launchers import pods
from launchers.job import Job, PrepJob
from launchers.passwords import refuse_password
from launchers.pods import CONTAINER, Manifest
from launchers.site import RECIPE_FOLDER, Site

TRAINER_API, JOBSET_API = "trainer.kubeflow.org/v1alpha1", "jobset.x-k8s.io/v1alpha2"

RESTARTS = 10
"""How often a JobSet makes all pods anew, for whatever reason: a drained node counts too."""

PART_RETRIES = 3
"""How often a part of a preparation is tried again; it goes on where it was."""

_RECIPE_KEY = "recipe.yaml"
_USER_ERROR = 2
_LONGEST = 63


def resource_name(text: str) -> str:
    """A name that Kubernetes takes, nearest to `text`.

    >>> resource_name("dino_retina Weak.2")
    'dino-retina-weak-2'
    >>> resource_name("3d_run")
    'run-3d-run'
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return name if re.match(r"[a-z]", name) else f"run-{name}".rstrip("-")


def train_job(
    job: Job,
    site: Site,
    *,
    nodes: int,
    gpus: int,
    name: str,
    preflight: bool = True,
    secret: str | None = None,
    patch: bool = True,
) -> Manifest:
    """A TrainJob on the site's ClusterTrainingRuntime.

    Args:
        nodes, gpus: pods, and processes (with a GPU each) in a pod.
        name: of the TrainJob; `resource_name` makes one.
        preflight: let `medpretrain preflight` pass first.
        secret: a Secret from whose keys SECRET_KEYS become variables.
        patch: bring volumes, shared memory, grace period and rights along as `runtimePatches` (Kubeflow Trainer 2.3 or
            later), on whatever runtime. Without it the runtime must be one of `training_runtime`, with the volumes that
            the site names; every 2.x will do.

    Raises:
        UserError: the numbers do not divide the global batch, no image, a name that is none, a run's folder or
            checkpoints that would be gone with their pod.
    """
    job.refuse_size(nodes * gpus, f"{nodes} pods x {gpus} processes")
    _refuse_name(name, nodes)
    _refuse_lost(job, site)
    recipe = _mounted_recipe(job, name)
    if recipe and not patch:
        raise UserError(
            "a recipe that is a file here comes as a volume, which only a patch of the runtime can bring: put the "
            "file on one of kubernetes.volumes, or into the image, or patch the runtime"
        )
    _refuse_secret(secret)
    trainer: Manifest = {
        "image": pods.image_of(site),
        "command": pods.command(pods.train_script(job, site, name, preflight)),
        "numNodes": nodes,
        "numProcPerNode": gpus,
        "env": [*pods.environment(site), *pods.secret_environment(secret)],
    }
    asked = pods.resources(site, gpus)
    if asked:
        trainer["resourcesPerNode"] = asked
    spec: Manifest = {
        "runtimeRef": {
            "apiGroup": TRAINER_API.split("/")[0],
            "kind": "ClusterTrainingRuntime",
            "name": site.kubernetes.runtime,
        },
        "trainer": trainer,
    }
    if patch:
        held, mounts = pods.volumes(site, shared_memory=True, recipe=recipe)
        container = {"name": CONTAINER, "volumeMounts": mounts, "securityContext": pods.container_security()}
        pod = {
            "terminationGracePeriodSeconds": site.kubernetes.grace_s,
            **pods.placement(site),
            "volumes": held,
            "containers": [container],
        }
        node = {"name": CONTAINER, "template": {"spec": {"template": {"metadata": _labels(name), "spec": pod}}}}
        patched = {"template": {"spec": {"replicatedJobs": [node]}}}
        spec["runtimePatches"] = [{"manager": "medpretrain/launch", "trainingRuntimeSpec": patched}]
    return {"apiVersion": TRAINER_API, "kind": "TrainJob", "metadata": _metadata(name, site), "spec": spec}


def training_runtime(site: Site, *, name: str, restarts: int = RESTARTS, secret: str | None = None) -> Manifest:
    """A ClusterTrainingRuntime with what a TrainJob can say only from Kubeflow Trainer 2.3 on, or not at all.

    That is volumes, shared memory, grace period, rights, and the restart of all pods together. An administrator applies
    it once; `kubernetes.runtime` of the site names it.

    Args:
        restarts: how often all pods are made anew.
        secret: a Secret, in the namespace of the runs, all of which becomes variables.
    """
    _refuse_name(name, 1)
    _refuse_secret(secret)
    pod = _pod(site, {"name": CONTAINER, "image": pods.image_of(site)}, secret=secret)
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {**_RESTART_TOGETHER, "template": {"metadata": {"labels": _APP}, "spec": pod}},
    }
    return {
        "apiVersion": TRAINER_API,
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": name, "labels": {**_APP, "trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": _failure_policy(restarts),
                    "replicatedJobs": [{"name": CONTAINER, "template": template}],
                }
            },
        },
    }


def job_set(
    job: Job,
    site: Site,
    *,
    nodes: int,
    gpus: int,
    name: str,
    preflight: bool = True,
    secret: str | None = None,
    restarts: int = RESTARTS,
) -> Manifest:
    """A JobSet, for a cluster without Kubeflow Trainer; the arguments are those of `train_job`.

    Args:
        secret: a Secret all of which becomes variables.
        restarts: how often all pods are made anew.

    Raises:
        UserError: as `train_job`.
    """
    job.refuse_size(nodes * gpus, f"{nodes} pods x {gpus} processes")
    _refuse_name(name, nodes)
    _refuse_secret(secret)
    _refuse_lost(job, site)
    container: Manifest = {
        "name": CONTAINER,
        "image": pods.image_of(site),
        "command": pods.command(pods.train_script(job, site, name, preflight)),
        "env": [*pods.jobset_environment(name, nodes, gpus), *pods.environment(site)],
    }
    asked = pods.resources(site, gpus)
    if asked:
        container["resources"] = asked
    pod = _pod(site, container, secret=secret, recipe=_mounted_recipe(job, name))
    template = {
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            **_RESTART_TOGETHER,
            "template": {"metadata": _labels(name), "spec": pod},
        }
    }
    return {
        "apiVersion": JOBSET_API,
        "kind": "JobSet",
        "metadata": _metadata(name, site),
        "spec": {
            # The first pod is NAME-node-0-0.NAME, before it is ready: the others wait for it in the preflight.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _failure_policy(restarts),
            "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": template}],
        },
    }


def prep_job(
    prep: PrepJob, site: Site, *, name: str, parallelism: int | None = None, secret: str | None = None
) -> Manifest:
    """An indexed Job: pod i prepares part i + 1; whichever ends last merges.

    Args:
        name: of the Job.
        parallelism: pods at a time; all without it.
        secret: a Secret all of which becomes variables.

    Raises:
        UserError: no image, a name that is none, an OUT or `--private` that would be gone with its pod, a file that no
            pod would find.
    """
    _refuse_name(name, prep.parts)
    _refuse_secret(secret)
    pods.refuse_lost(prep.out, "OUT", site, beside=True)
    if prep.private is not None:
        pods.refuse_lost(prep.private, "--private", site, beside=True)
    for what, path in prep.reads:
        pods.refuse_unseen(path, what, site)
    container: Manifest = {
        "name": "prep",
        "image": pods.image_of(site),
        "command": pods.command(pods.prep_script(prep, site)),
    }
    for key, value in (("env", pods.prep_environment(site)), ("resources", pods.resources(site, 0))):
        if value:
            container[key] = value
    held, mounts = pods.volumes(site, shared_memory=False)
    pod = {
        "restartPolicy": "Never",
        **pods.placement(site),
        **({"volumes": held} if held else {}),
        "containers": [_finished(container, mounts, secret)],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, site),
        "spec": {
            "completionMode": "Indexed",
            "completions": prep.parts,
            "parallelism": min(parallelism or prep.parts, prep.parts),
            "backoffLimitPerIndex": PART_RETRIES,
            "podFailurePolicy": {
                "rules": [
                    _on_user_error("prep"),
                    # A drained node is no fault of the part's.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"metadata": _labels(name), "spec": pod},
        },
    }


def recipe_map(job: Job, site: Site, *, name: str) -> tuple[Job, Manifest | None]:
    """A recipe that is a file here, as a ConfigMap, and the run that finds it in its pods.

    Without change and None: the name of a shipped recipe, or a file on one of the site's volumes.

    Raises:
        UserError: no such file, or a password stands in it, used or not.
    """
    if not job.recipe.endswith((".yaml", ".yml")) or pods.volume_of(job.recipe, site):
        return job, None
    try:
        text = Path(job.recipe).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{job.recipe}: {error.strerror or error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        refuse_password(line, f"{job.recipe}:{number}")
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, site, queued=False),
        "data": {_RECIPE_KEY: text},
    }
    return replace(job, recipe=f"{RECIPE_FOLDER}/{_RECIPE_KEY}"), manifest


_APP = {"app.kubernetes.io/name": "medpretrain", "app.kubernetes.io/managed-by": "medpretrain-launch"}


def _labels(name: str) -> Manifest:
    return {"labels": {**_APP, "app.kubernetes.io/instance": name}}


def _metadata(name: str, site: Site, *, queued: bool = True) -> Manifest:
    labels = dict(_labels(name)["labels"])
    if queued and site.kubernetes.queue:
        labels["kueue.x-k8s.io/queue-name"] = site.kubernetes.queue
    return {"name": name, "namespace": site.kubernetes.namespace, "labels": labels}


def _pod(site: Site, container: Manifest, *, secret: str | None = None, recipe: str | None = None) -> Manifest:
    """Of a run."""
    held, mounts = pods.volumes(site, shared_memory=True, recipe=recipe)
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": site.kubernetes.grace_s,
        **pods.placement(site),
        "volumes": held,
        "containers": [_finished(container, mounts, secret)],
    }


def _finished(container: Manifest, mounts: list[Manifest], secret: str | None) -> Manifest:
    more: Manifest = {"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}
    if mounts:
        more["volumeMounts"] = mounts
    return {**container, **more, "securityContext": pods.container_security()}


def _on_user_error(container: str) -> Manifest:
    """torchrun ends with 1 whatever its processes end with, so this is the code of a preflight or a preparation."""
    codes = {"containerName": container, "operator": "In", "values": [_USER_ERROR]}
    return {"action": "FailJob", "onExitCodes": codes}


# One pod that fails fails the Job, and the JobSet makes all of them anew.
_RESTART_TOGETHER: Manifest = {"backoffLimit": 0, "podFailurePolicy": {"rules": [_on_user_error(CONTAINER)]}}


def _failure_policy(restarts: int) -> Manifest:
    rule = {"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {"maxRestarts": restarts, "rules": [rule]}


def _mounted_recipe(job: Job, name: str) -> str | None:
    return name if job.recipe.startswith(f"{RECIPE_FOLDER}/") else None


def _refuse_lost(job: Job, site: Site) -> None:
    pods.refuse_lost(str(job.run_dir), "the run's folder", site)
    if job.checkpoint_to is not None:
        pods.refuse_lost(job.checkpoint_to, "checkpoint.to", site)


def _refuse_name(name: str, pods_of_it: int) -> None:
    """Pods are called NAME-node-0-INDEX-XXXXX and have 63 characters for it."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise UserError(
            f"{name!r} is no name for Kubernetes: small letters, digits and hyphens, a letter first, no hyphen last; "
            f"such as {resource_name(name)!r}"
        )
    longest = _LONGEST - len(f"-{CONTAINER}-0-{pods_of_it - 1}-xxxxx")
    if len(name) > longest:
        raise UserError(f"{name!r} has {len(name)} characters; at most {longest} leave room for the names of its pods")


def _refuse_secret(secret: str | None) -> None:
    if secret is not None and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", secret):
        raise UserError("--secret takes the name of a Secret (small letters, digits, hyphens), never what is in it")
