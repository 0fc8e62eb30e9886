"""Manifests as YAML that a person can read, and through `kubectl` to a cluster."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from data_prep.errors import UserError, WorkFailed, nearest
from launchers.pods import Manifest

TIMEOUT_S = 60

_SAFE = re.compile(r"[A-Za-z/][A-Za-z0-9./_-]*")
_WORDS_OF_YAML = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}

_LOGS = {
    "TrainJob": "jobset.sigs.k8s.io/jobset-name",
    "JobSet": "jobset.sigs.k8s.io/jobset-name",
    "Job": "batch.kubernetes.io/job-name",
}


def to_yaml(
    manifests: Manifest | Sequence[Manifest], made_by: str = "medpretrain launch kubernetes", *, again: bool = True
) -> str:
    """The manifests as one text; its first lines say how it was made, and how to start, follow, stop and go on.

    Args:
        made_by: the command line, without anything secret.
        again: whether the same manifest goes on with the run; one with `--resume` begins where it says.
    """
    listed = [manifests] if isinstance(manifests, dict) else list(manifests)
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 4096
    yaml.representer.ignore_aliases = lambda data: True  # type: ignore[assignment]
    text = io.StringIO()
    text.write("".join(f"# {line}".rstrip() + "\n" for line in _header(listed, made_by, again)))
    yaml.dump_all([_readable(manifest) for manifest in listed], text)
    return text.getvalue()


def check(text: str, namespace: str) -> None:
    """Ask the cluster whether it would take `text`; nothing is made.

    Raises:
        UserError: no `kubectl`; no such namespace or ClusterTrainingRuntime, with the nearest; the cluster refuses.
        WorkFailed: no answer in time.
    """
    _refuse_without_kubectl()
    _refuse_missing("namespace", namespace, "; `kubectl create namespace NAME` makes one")
    for manifest in YAML(typ="safe", pure=True).load_all(text):
        reference = manifest.get("spec", {}).get("runtimeRef") if isinstance(manifest, dict) else None
        if reference and reference.get("kind", "ClusterTrainingRuntime") == "ClusterTrainingRuntime":
            _refuse_missing(
                "clustertrainingruntime",
                reference["name"],
                "; name another as kubernetes.runtime in the site's file, or have an administrator apply one",
            )
    _create(text, namespace, "--dry-run=server")


def submit(text: str, namespace: str, file: Path | None = None) -> str:
    """Send manifests to the cluster that `kubectl` is set up for; what `kubectl` says of it is returned.

    Args:
        file: where the manifests are kept, once the cluster would take them: to stop the run and to go on with it.

    Raises:
        UserError, WorkFailed: as `check`, which comes first, so that nothing is begun that cannot go on.
    """
    check(text, namespace)
    if file is not None:
        file.write_text(text)
    return _create(text, namespace)


def _header(manifests: list[Manifest], made_by: str, again: bool) -> list[str]:
    lines = [f"Made by: {' '.join(made_by.split())}"]
    runs = [manifest for manifest in manifests if manifest["kind"] in _LOGS]
    if not runs:
        return [*lines, "Apply: kubectl apply -f FILE"]
    lines.append("Start:   kubectl create -f FILE")
    for run in runs:
        kind, name = run["kind"].lower(), run["metadata"]["name"]
        at = f"kubectl -n {run['metadata'].get('namespace', 'default')}"
        label, parallel = _LOGS[run["kind"]], _pods_of(run)
        lines += [
            f"State:   {at} get {kind} {name}; {at} get pods -l {label}={name}",
            f"Follow:  {at} logs -f --tail=-1 --prefix --max-log-requests={max(5, parallel)} -l {label}={name}",
        ]
    stop = "kubectl delete --cascade=foreground -f FILE"
    if any(run["kind"] == "Job" for run in runs):
        return [*lines, f"Stop:    {stop}", f"Go on:   {stop} && kubectl create -f FILE (parts that are done stay)"]
    go_on = f"{stop} && kubectl create -f FILE (from the last checkpoint)"
    return [
        *lines,
        f"Stop:    {stop} (waits while a checkpoint is committed)",
        f"Go on:   {go_on if again else 'the same command without --resume'}",
    ]


def _pods_of(run: Manifest) -> int:
    spec = run["spec"]
    if run["kind"] == "TrainJob":
        return int(spec["trainer"]["numNodes"])
    if run["kind"] == "JobSet":
        return sum(int(part["template"]["spec"]["parallelism"]) for part in spec["replicatedJobs"])
    return int(spec["parallelism"])


def _readable(value: Any) -> Any:
    """Scripts as blocks; quotes wherever YAML 1.1, which Kubernetes reads, might see another thing than a string."""
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" in value:
        return LiteralScalarString(value)
    plain = _SAFE.fullmatch(value) and value.lower() not in _WORDS_OF_YAML
    return value if plain else DoubleQuotedScalarString(value)


def _refuse_without_kubectl() -> None:
    if shutil.which("kubectl") is None:
        raise UserError(
            "there is no `kubectl` here: install it (https://kubernetes.io/docs/tasks/tools), or write the manifest "
            "with --dry-run and apply it where there is one"
        )


def _refuse_missing(kind: str, name: str, otherwise: str) -> None:
    got = _kubectl("get", kind, name, "-o", "name")
    if got.returncode == 0:
        return
    said = got.stderr.strip()
    if "doesn't have a resource type" in said:
        raise UserError(f"the cluster has no Kubeflow Trainer: {said}; a JobSet does without")
    if "Forbidden" in said or "forbidden" in said:
        return  # Who may not look may still be allowed to start; the server says so next.
    if "NotFound" not in said:
        raise UserError(f"kubectl: {said}")
    there = _kubectl("get", kind, "-o", "name")
    names = [line.partition("/")[2] for line in there.stdout.split()] if there.returncode == 0 else []
    raise UserError(f"the cluster has no {kind} {name!r}{nearest(name, names)}{otherwise}")


def _create(text: str, namespace: str, *options: str) -> str:
    got = _kubectl("create", "--validate=strict", *options, "-n", namespace, "-f", "-", given=text)
    if got.returncode == 0:
        return got.stdout
    said = got.stderr.strip()
    hint = next((hint for sign, hint in _HINTS.items() if sign in said), "")
    raise UserError(f"kubectl: {said}{hint}")


_HINTS = {
    "AlreadyExists": "\nTake another name, or delete that one first, which waits for its processes (checkpoints stay): "
    "kubectl delete --cascade=foreground -f FILE",
    'unknown field "spec.runtimePatches': "\nThis Kubeflow Trainer is older than 2.3: let an administrator apply the "
    "runtime that the launch writes, and start without patches",
    'no matches for kind "TrainJob"': "\nThe cluster has no Kubeflow Trainer; a JobSet does without",
    'no matches for kind "JobSet"': "\nThe cluster has no JobSet either: https://jobset.sigs.k8s.io/docs/installation",
}


def _kubectl(*words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            ["kubectl", *words], input=given or "", capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise WorkFailed(
            f"kubectl {words[0]} had no answer for {TIMEOUT_S} s; does `kubectl cluster-info` reach the cluster?"
        ) from None
    done.stderr = re.sub(r"^[EWI]\d{4} .*\n", "", done.stderr, flags=re.MULTILINE)  # its own log, and in one line after
    return done
