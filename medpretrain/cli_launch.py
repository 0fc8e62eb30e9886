"""`medpretrain launch`: from a recipe to running processes on one host or a cluster. Imports no torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.errors import UserError, WorkFailed
from launchers import deepspeed as by_deepspeed
from launchers import kubectl, slurm_queue
from launchers import kubernetes as by_kubernetes
from launchers import slurm as by_slurm
from launchers import torchrun as by_torchrun
from launchers.command import Command
from launchers.head import Head
from launchers.hostfile import read_hostfile, selected
from launchers.pods import Manifest
from launchers.site import Site
from launchers.torchrun import Nodes
from medpretrain.launch_request import SITE_FILE, SITE_VARIABLE, job_of, launch_folder, load_site, prep_job_of

app = typer.Typer(
    help="Start a run: on this host, on hosts of a file, in SLURM's queue, on Kubernetes.", no_args_is_help=True
)
prep_app = typer.Typer(help="Prepare data in parts, as an array of jobs.", no_args_is_help=True)
app.add_typer(prep_app, name="prep")


class KindOfRun(StrEnum):
    trainjob = "trainjob"
    jobset = "jobset"


RecipeName = Annotated[str, typer.Argument(help="a shipped recipe's name, or a .yaml file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as in optim.lr=3e-4", show_default=False)]
Gpus = Annotated[
    int | None,
    typer.Option(min=1, help="processes on each host, a GPU each; else the site file's", show_default=False),
]
SiteFile = Annotated[
    Path | None,
    typer.Option(
        "--site", help=f"a file of site defaults; else ${SITE_VARIABLE}, else {SITE_FILE}", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would run, and start nothing")]
Preflight = Annotated[bool, typer.Option(help="look at every host before anything is trained")]
Resume = Annotated[str, typer.Option(help="as of `medpretrain train`")]
Override = Annotated[list[str] | None, typer.Option(help="as of `medpretrain train`; repeatable", show_default=False)]
HeadName = Annotated[
    str | None, typer.Option(help="HOST or HOST:PORT where all meet, the same on every host", show_default=False)
]
Partition = Annotated[str | None, typer.Option(show_default=False)]
Account = Annotated[str | None, typer.Option(show_default=False)]
Time = Annotated[str | None, typer.Option(help="the time limit, as sbatch takes it", show_default=False)]
Follow = Annotated[bool, typer.Option(help="show the log until the job is over; Ctrl-C leaves the job alone")]
PrepWords = Annotated[
    list[str], typer.Argument(help="the words after `medpretrain prep`", metavar="KIND SOURCE OUT ...")
]
Parts = Annotated[int, typer.Option(min=1, help="how many parts, each a job")]
Name = Annotated[str | None, typer.Option(help="of the run on Kubernetes", show_default=False)]
Secret = Annotated[
    str | None,
    typer.Option(help="a Secret whose keys become variables: passwords, S3 keys", show_default=False),
]
_VERBATIM = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command()
def torchrun(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="hosts: N, or MIN:MAX where they may come and go")] = "1",
    gpus: Gpus = None,
    head: HeadName = None,
    hosts: Annotated[
        str | None,
        typer.Option(help="their names, with commas, so that one that is missing is named", show_default=False),
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, help="of the processes, each from the newest checkpoint")] = 100,
    preflight: Preflight = True,
    resume: Resume = "auto",
    override: Override = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Train under torchrun; on several hosts run the same command on each."""
    found, job = load_site(site), job_of(recipe, overrides, resume, override)
    size, meet = Nodes.parse(nodes), Head.parse(head, by_torchrun.PORT) if head else None
    per_host = gpus or found.gpus or _gpus_here()
    train = by_torchrun.train(job, found, nodes=size, gpus=per_host, head=meet, restarts=restarts)
    if meet is not None and not dry_run:
        meet.refuse_unknown()
    named = [name.strip() for name in hosts.split(",")] if hosts else []
    gate = by_torchrun.preflight(job, found, nodes=size, gpus=per_host, head=meet, hosts=named)
    if meet is not None and dry_run:
        typer.echo("# as on this host; --local-addr is another on each")
    _say_no_image(found)
    _run([gate] if preflight else [], train, dry_run)


@app.command()
def deepspeed(
    recipe: RecipeName,
    overrides: Overrides = None,
    hostfile: Annotated[Path, typer.Option(help="a line a host: `gpu01 slots=8`")] = Path("hostfile"),
    include: Annotated[str, typer.Option(help="hosts and slots that take part: gpu01@gpu02:0,2")] = "",
    exclude: Annotated[str, typer.Option(help="hosts and slots that do not")] = "",
    head: HeadName = None,
    ssh_port: Annotated[int | None, typer.Option(show_default=False)] = None,
    no_ssh: Annotated[bool, typer.Option("--no-ssh", help="the same command runs on each host")] = False,
    node_rank: Annotated[
        int | None, typer.Option(help="with --no-ssh: this host's place, from 0", show_default=False)
    ] = None,
    preflight: Preflight = True,
    resume: Resume = "auto",
    override: Override = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Train with DeepSpeed's launcher on the hosts of a hostfile, over ssh and pdsh or without."""
    found = load_site(site)
    job = job_of(recipe, ["strategy=deepspeed", *(overrides or [])], resume, override)
    if no_ssh and node_rank is None:
        raise UserError("--no-ssh needs this host's place in the hostfile: --node-rank 0 on the first, 1 on the next")
    if node_rank is not None and not no_ssh:
        raise UserError(
            "--node-rank is for --no-ssh, where the same command runs on each host; leave it out, or add that"
        )
    meet = Head.parse(head, by_deepspeed.PORT) if head else None
    hosts = by_deepspeed.Hosts(selected(read_hostfile(hostfile), include, exclude), meet, ssh_port, node_rank)
    train = by_deepspeed.train(job, found, hosts)
    gates = [by_deepspeed.preflight(job, found, hosts)] if preflight else []
    _say_no_image(found)
    if not no_ssh:
        if kept := by_deepspeed.kept_here():
            typer.echo(
                f"{', '.join(kept)}: not carried to the hosts, for a command line would show it. For MLflow write "
                f"user and password into ~/.mlflow/credentials on {next(iter(hosts.slots))}, "
                "or `medpretrain sync` later",
                err=True,
            )
        if not dry_run:
            by_deepspeed.refuse_unreachable(list(hosts.slots), ssh_port)
    _run(gates, train, dry_run)


@app.command()
def slurm(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Gpus = None,
    partition: Partition = None,
    account: Account = None,
    time: Time = None,
    preflight: Preflight = True,
    follow: Follow = True,
    resume: Resume = "auto",
    override: Override = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Write an sbatch script, submit it and follow its log; it requeues and resumes by itself."""
    found, job = load_site(site), job_of(recipe, overrides, resume, override)
    per_node = _gpus_of_node(gpus, found)
    request = by_slurm.Request.of(found, nodes=nodes, gpus=per_node, partition=partition, account=account, time=time)
    folder = launch_folder(job.run_dir).absolute()
    log = folder / "slurm-%j.out"
    script = by_slurm.train_script(job, found, request, log, preflight=preflight)
    _submit(script, folder / "job.sbatch", log, request, follow, dry_run, again=resume == "auto")


@app.command()
def kubernetes(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="pods")] = 1,
    gpus: Gpus = None,
    kind: Annotated[KindOfRun, typer.Option(help="trainjob (Kubeflow Trainer 2) or jobset")] = KindOfRun.trainjob,
    patch: Annotated[
        bool, typer.Option(help="bring volumes, memory and grace period along; Kubeflow Trainer before 2.3 cannot")
    ] = True,
    name: Name = None,
    secret: Secret = None,
    preflight: Preflight = True,
    resume: Resume = "auto",
    override: Override = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Write the manifest of a run, have the cluster check it, and send it."""
    found, job = load_site(site), job_of(recipe, overrides, resume, override)
    called = name or by_kubernetes.resource_name(job.name)
    per_pod = _gpus_of_node(gpus, found)
    job, recipe_file = by_kubernetes.recipe_map(job, found, name=called)
    how: Any = {"nodes": nodes, "gpus": per_pod, "name": called, "preflight": preflight, "secret": secret}
    if kind is KindOfRun.jobset:
        run = by_kubernetes.job_set(job, found, **how)
    else:
        run = by_kubernetes.train_job(job, found, **how, patch=patch)
    _create([*([recipe_file] if recipe_file else []), run], found, dry_run, again=resume == "auto")


@app.command("kubernetes-runtime")
def kubernetes_runtime(
    name: Annotated[str, typer.Argument(help="of the ClusterTrainingRuntime; kubernetes.runtime of the site names it")],
    secret: Secret = None,
    site: SiteFile = None,
) -> None:
    """Print the runtime that an administrator applies once: volumes, grace period, all pods anew after a loss."""
    typer.echo(kubectl.to_yaml(by_kubernetes.training_runtime(load_site(site), name=name, secret=secret)), nl=False)


@prep_app.command("kubernetes", context_settings=_VERBATIM)
def prep_kubernetes(
    words: PrepWords,
    parts: Parts,
    at_once: Annotated[int | None, typer.Option(min=1, help="pods at a time; else all", show_default=False)] = None,
    name: Name = None,
    secret: Secret = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Send an indexed Job of `medpretrain prep KIND SOURCE OUT ... --part i/n`; the options come before KIND."""
    found, job = load_site(site), prep_job_of(words, parts)
    called = name or by_kubernetes.resource_name(job.name)
    _create([by_kubernetes.prep_job(job, found, name=called, parallelism=at_once, secret=secret)], found, dry_run)


@prep_app.command("slurm", context_settings=_VERBATIM)
def prep_slurm(
    words: PrepWords,
    parts: Parts,
    partition: Partition = None,
    account: Account = None,
    time: Time = None,
    follow: Follow = True,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Submit an array of `medpretrain prep KIND SOURCE OUT ... --part i/n`; the options come before KIND."""
    found, job = load_site(site), prep_job_of(words, parts)
    found = found.model_copy(update={"slurm": found.slurm.model_copy(update={"gpu_option": "none"})})
    request = by_slurm.Request.of(found, nodes=1, gpus=1, partition=partition, account=account, time=time)
    folder = Path(f"{job.out.rstrip('/')}.launch" if "://" not in job.out else f"{job.name}.launch").absolute()
    log = folder / "slurm-%A_%a.out"
    script = by_slurm.prep_script(job, found, request, log)
    _submit(script, folder / "array.sbatch", log, request, follow, dry_run)


def _say_no_image(site: Site) -> None:
    if site.image is not None:
        typer.echo(
            f"image: of the site file is not used here; processes run by this Python, {sys.executable}", err=True
        )


def _run(gates: list[Command], train: Command, dry_run: bool) -> None:
    if dry_run:
        for command in [*gates, train]:
            typer.echo(command)
        return
    for gate in gates:
        code = gate.run()
        if code:
            raise WorkFailed("the preflight did not pass, so nothing was trained (--no-preflight goes without)")
    train.become()


def _submit(
    script: str, path: Path, log: Path, request: by_slurm.Request, follow: bool, dry_run: bool, *, again: bool = True
) -> None:
    """
    Args:
        again: whether the same script goes on with the run; one with `--resume` begins where it says.
    """
    if dry_run:
        # sbatch takes a folder for the log that is not there, and the job then fails without a word.
        typer.echo(f"# mkdir -p {shlex.quote(str(path.parent))} && sbatch {shlex.quote(str(path))}")
        typer.echo(script, nl=False)
        return
    slurm_queue.refuse_without_slurm()
    slurm_queue.refuse_partition(request.partition, request.nodes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    job = slurm_queue.submit(path, log)
    typer.echo(f"job {job.number}: {path}")
    typer.echo(f"log: {job.log}")
    typer.echo(f"stop: scancel {job.number}")
    resume = f"sbatch {shlex.quote(str(path))}" if again else "the same command without --resume"
    typer.echo(f"resume: {resume}")
    if not follow:
        return
    try:
        state = slurm_queue.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\njob {job.number} goes on; stop it with: scancel {job.number}")
        return
    if state != "COMPLETED":
        raise WorkFailed(f"job {job.number} ended as {state}; {job.log} says why. Resume: {resume}")


def _create(manifests: list[Manifest], site: Site, dry_run: bool, *, again: bool = True) -> None:
    text = kubectl.to_yaml(manifests, shlex.join(["medpretrain", *sys.argv[1:]]), again=again)
    if dry_run:
        typer.echo(text, nl=False)
        return
    file = Path(f"{manifests[-1]['metadata']['name']}.launch.yaml")
    text = text.replace("-f FILE", f"-f {file}")
    typer.echo(kubectl.submit(text, site.kubernetes.namespace, file), nl=False)
    typer.echo("".join(line for line in text.splitlines(keepends=True) if line.startswith("# ")), nl=False)


def _gpus_of_node(given: int | None, site: Site) -> int:
    """
    Raises:
        UserError: nobody says how many.
    """
    found = given or site.gpus
    if found is None:
        raise UserError("how many GPUs has a node? Say it with --gpus, or as gpus: in the site file")
    return found


def _gpus_here() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        typer.echo("no GPU is seen here: one process; --gpus says otherwise", err=True)
        return 1
    return len(listed.strip().splitlines())
