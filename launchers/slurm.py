"""SLURM: an sbatch script that a person can read, from recipe to requeue; and arrays that prepare data.

A task a GPU is started by srun itself, so exit codes and signals are the ranks' own. The script stays alive beside
them: it asks them to leave before the time limit, puts the job back into the queue, and starts them again where a rank
failed.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from data_prep.errors import UserError
from launchers.command import medpretrain
from launchers.job import PYTHON, Job, PrepJob
from launchers.site import Site

RESTARTS = 10
"""Within one allocation; a run that gets no further is stopped earlier by its own count."""


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM, beside the site's defaults."""

    nodes: int = 1
    gpus: int = 1
    """Tasks on each node, a GPU each."""
    cpus: int | None = None
    """Cores of each node."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None

    @classmethod
    def of(cls, site: Site, *, nodes: int, gpus: int, **given: str | None) -> Request:
        """The site's defaults, with what was given in their place."""
        slurm = site.slurm
        named = {name: given.get(name) or getattr(slurm, name) for name in ("partition", "account", "qos", "time")}
        return cls(nodes=nodes, gpus=gpus, cpus=site.cpus, **named)


def train_script(job: Job, site: Site, request: Request, log: Path, *, preflight: bool = True) -> str:
    """The script that trains `job`.

    Args:
        log: where SLURM writes; may hold %j.

    Raises:
        UserError: the tasks do not divide the global batch, or the image's file is not there.
    """
    job.refuse_size(request.nodes * request.gpus, f"{request.nodes} nodes x {request.gpus} tasks")
    refuse_image(site)
    options = [
        f"--ntasks-per-node={request.gpus}",
        "--exclusive",
        "--requeue",
        f"--signal=B:USR1@{site.slurm.signal_s}",
    ]
    gate = ""
    if preflight:
        words = [*job.preflight, "--nodes", str(request.nodes), "--gpus", str(request.gpus)]
        gate = _GATE.substitute(run=_srun(site), preflight=_in_container(site, medpretrain(words, _python(site))))
    return _TRAIN.substitute(
        what=_comment(job.train),
        sbatch=_header(job.name, site, request, log, options),
        folder=shlex.quote(os.getcwd()),
        environment=_environment(site),
        tasks=request.gpus,
        gate=gate,
        restarts=RESTARTS,
        run=_srun(site),
        train=_in_container(site, medpretrain(job.train, _python(site))),
    )


def prep_script(job: PrepJob, site: Site, request: Request, log: Path) -> str:
    """The array that prepares data, a task a part; which part ends last finishes the dataset.

    Raises:
        UserError: the image's file is not there.
    """
    refuse_image(site)
    options = [f"--array=1-{job.parts}", "--ntasks=1", "--requeue"]
    if request.cpus:
        options.append(f"--cpus-per-task={request.cpus}")
    words = medpretrain(["prep", *job.words], _python(site))
    workers = "" if job.says_workers else ' --workers "${SLURM_CPUS_PER_TASK:-1}"'
    return _PREP.substitute(
        what=_comment(["prep", *job.words]),
        sbatch=_header(job.name, site, request, log, options),
        folder=shlex.quote(os.getcwd()),
        environment=_environment(site),
        run=_srun(site),
        prep=f'{_in_container(site, words)} --part "$SLURM_ARRAY_TASK_ID/{job.parts}"{workers}',
    )


def refuse_image(site: Site) -> None:
    """
    Raises:
        UserError: the image is a file, and is not there.
    """
    image = site.image
    if image and image.endswith((".sqsh", ".sif")) and not Path(image).is_file():
        raise UserError(f"there is no image {image}; docker/README.md says how to make one")


def _header(name: str, site: Site, request: Request, log: Path, more: Sequence[str]) -> str:
    """The lines that sbatch reads, which takes quotes as a shell does."""
    options = [f"--job-name={name}", f"--nodes={request.nodes}", f"--output={log}", "--open-mode=append"]
    for option in ("partition", "account", "qos", "time"):
        value = getattr(request, option)
        options += [f"--{option}={value}"] if value else []
    if site.slurm.gpu_option != "none":
        sign = "=gpu:" if site.slurm.gpu_option == "gres" else "="
        options.append(f"--{site.slurm.gpu_option}{sign}{request.gpus}")
    return "\n".join(f"#SBATCH {option}" for option in [*map(shlex.quote, [*options, *more]), *site.slurm.extra])


def _comment(words: Sequence[str]) -> str:
    return f"medpretrain {shlex.join(words)}".replace("\n", " ")


def _environment(site: Site) -> str:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    return "\n".join([*lines, *site.setup])


def _python(site: Site) -> str:
    return PYTHON if site.image else sys.executable


def _srun(site: Site) -> str:
    """srun, in the container where pyxis makes it."""
    words = ["srun"]
    if site.image and site.slurm.container == "pyxis":
        words.append(f"--container-image={site.image}")
        if site.mounts:
            words.append(f"--container-mounts={','.join(site.mounts)}")
        words.append(f"--container-workdir={os.getcwd()}")
    return shlex.join(words)


def _in_container(site: Site, words: Sequence[str]) -> str:
    """The command, in the container where apptainer makes it."""
    if site.image and site.slurm.container == "apptainer":
        binds = [word for mount in site.mounts for word in ("--bind", mount)]
        words = ["apptainer", "exec", "--nv", *binds, site.image, *words]
    return shlex.join(words)


_TRAIN = Template("""\
#!/bin/bash
# $what
# Written by `medpretrain launch slurm`; `sbatch` takes it as it is, and the same command again goes on with the run.
$sbatch
cd $folder || exit 1
$environment
set -u  # not before: `module` and `conda activate` read variables that are not set
# Where all tasks meet. Without a head there is no job: another address would make every node train alone.
head=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$$head" ] || { echo "scontrol does not say which nodes this job has" >&2; exit 1; }
export MASTER_ADDR=$$head MASTER_PORT=$$((15000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# A task is else bound to one core, and cannot decode its images.
export SRUN_CPUS_PER_TASK=$$((SLURM_CPUS_ON_NODE / $tasks))

# USR1 comes some time before the limit, TERM at the end of a pre-emption. The ranks commit a checkpoint and leave; srun
# passes USR1 on to them, and would kill them at TERM.
asked=
step=
leave() { asked=1; [ -z "$$step" ] || kill -USR1 "$$step" 2>/dev/null; }
trap leave USR1 TERM

# A step of all nodes, in the background, for only then a signal is heard at once; its exit code is in `code`.
finish() {
    step=$$1
    while :; do
        wait "$$step"
        code=$$?
        kill -0 "$$step" 2>/dev/null || break
    done
    [ "$$code" -le 128 ] || { wait "$$step" 2>/dev/null; ended=$$?; [ "$$ended" -eq 127 ] || code=$$ended; }
    step=
}

back_into_the_queue() {
    # A job that was cancelled is not running any more, and stays cancelled.
    state=$$(scontrol show job "$$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
    [ "$$state" = JobState=RUNNING ] || { echo "not put back into the queue: $$state"; exit 0; }
    echo "back into the queue: job $$SLURM_JOB_ID goes on from its newest checkpoint"
    scontrol requeue "$$SLURM_JOB_ID" || exit 75
    exec sleep 300  # SLURM ends this; a script that ended by itself would end the job
}
$gate
for restart in $$(seq 0 $restarts); do
    [ -z "$$asked" ] || back_into_the_queue
    export MEDPRETRAIN_RESTART_COUNT=$$restart
    # A rank that fails lets the others end by themselves first, for they say why.
    $run --wait=30 --kill-on-bad-exit=0 bash -c '
        export RANK=$$SLURM_PROCID WORLD_SIZE=$$SLURM_NTASKS
        export LOCAL_RANK=$$SLURM_LOCALID LOCAL_WORLD_SIZE=$$SLURM_NTASKS_PER_NODE
        exec "$$@"' rank $train &
    finish $$!
    case $$code in
        0) exit 0 ;;
        75) back_into_the_queue ;;
        2 | 76) exit "$$code" ;;  # the same command would fail again
    esac
    [ -z "$$asked" ] || back_into_the_queue
    echo "the ranks ended with $$code; they start again from the newest checkpoint in 10 s"
    sleep 10
done
exit "$$code"
""")

_GATE = Template("""
# Nothing is trained before every node is found fit.
SRUN_CPUS_PER_TASK=$$SLURM_CPUS_ON_NODE $run --ntasks="$$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 $preflight \\
    --head "$$head:$$((MASTER_PORT - 1))" --hosts "$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | paste -sd ,)" &
finish $$!
[ -z "$$asked" ] || back_into_the_queue
[ "$$code" -eq 0 ] || exit "$$code"
""")

_PREP = Template("""\
#!/bin/bash
# $what
# Written by `medpretrain launch prep slurm`; the same array again does what is left.
$sbatch
cd $folder || exit 1
$environment
exec $run $prep
""")
