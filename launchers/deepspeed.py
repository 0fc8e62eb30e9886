"""DeepSpeed's own launcher: a hostfile and pdsh over ssh, or the same command on each host without ssh."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from launchers.command import Command, after_setup, medpretrain
from launchers.head import Head
from launchers.hostfile import Slots
from launchers.job import Job
from launchers.site import SECRET_NAMES, Site

PORT = 29500
"""Of the rendezvous; preflight meets at the one below."""
_SSH_S = 10
_CARRIED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


@dataclass(frozen=True)
class Hosts:
    """The hosts of a launch and how they are reached.

    Attributes:
        slots: what `--include` and `--exclude` leave of the hostfile.
        head: where all meet; the first host by default.
        ssh_port: another than ssh's own configuration says.
        node_rank: this host's place among them, where the same command runs on each; None: pdsh starts it there.
    """

    slots: Slots
    head: Head | None = None
    ssh_port: int | None = None
    node_rank: int | None = None

    def __post_init__(self) -> None:
        if self.node_rank is not None and not 0 <= self.node_rank < len(self.slots):
            raise UserError(f"--node-rank {self.node_rank}: the hostfile has the places 0 to {len(self.slots) - 1}")

    @property
    def meet(self) -> Head:
        return self.head or Head(next(iter(self.slots)), PORT)


def launch_folder(run_dir: Path) -> Path:
    """Scripts and logs of a run's launches, beside its folder: a run's own folder holds nothing before it starts."""
    return run_dir.with_name(f"{run_dir.name}.launch")


def refuse_unreachable(hosts: Sequence[str], ssh_port: int | None = None) -> None:
    """
    Raises:
        UserError: a tool is missing, or a host does not let this user in by ssh without a question; all such are named.
    """
    for tool, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(tool) is None:
            raise UserError(
                f"{tool} is missing: install {package}, or run the command on every host with --no-ssh --node-rank N"
            )

    def asked(host: str) -> str | None:
        options = [
            "-o",
            "BatchMode=yes",
            "-o",
            f"ConnectTimeout={_SSH_S}",
            *(["-p", str(ssh_port)] if ssh_port else []),
        ]
        try:
            answer = subprocess.run(
                ["ssh", *options, host, "true"], capture_output=True, text=True, timeout=2 * _SSH_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"{host} (no answer in {2 * _SSH_S} s)"
        last = (answer.stderr.strip().splitlines() or [""])[-1]
        return f"{host} ({last or f'ssh ended with {answer.returncode}'})" if answer.returncode else None

    with ThreadPoolExecutor(32) as pool:
        failed = [said for said in pool.map(asked, hosts) if said]
    if failed:
        raise UserError(
            f"not to be reached by ssh: {'; '.join(failed)}. Mend it (`ssh HOST true` must end without a question), or "
            "leave hosts out with --exclude"
        )


def train(job: Job, site: Site, hosts: Hosts, *, hostfile: Path, include: str = "", exclude: str = "") -> Command:
    """The command of one host, or without ssh of each.

    Args:
        include, exclude: what made `hosts` of the hostfile.

    Raises:
        UserError: the slots do not divide the global batch; a word that DeepSpeed's way over pdsh would change.
    """
    slots = hosts.slots.values()
    job.refuse_size(sum(map(len, slots)), " + ".join(str(len(of_host)) for of_host in slots) + " slots")
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    words += ["--include", include] if include else []
    words += ["--exclude", exclude] if exclude else []
    words += ["--master_addr", hosts.meet.host, "--master_port", str(hosts.meet.port)]
    if hosts.node_rank is not None:
        words += ["--no_ssh", "--node_rank", str(hosts.node_rank)]
    else:
        _refuse_unquotable(job.train)
        # Its own check asks the first host alone. And a single host in the file is still that host, not this one.
        words += ["--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
        words += ["--ssh_port", str(hosts.ssh_port)] if hosts.ssh_port else []
        # DeepSpeed carries variables to the other hosts on a command line, which it also logs.
        words = ["env", *(word for name in secrets() for word in ("-u", name)), *words] if secrets() else words
    if site.setup:
        words += ["--venv_script", str(setup_file(job.run_dir).resolve())]
    variables = {"DS_ENV_FILE": str(environment_file(job.run_dir).resolve())}
    return Command([*words, "--no_local_rank", "--module", "medpretrain", *job.train], variables)


def preflight(job: Job, site: Site, hosts: Hosts) -> Command:
    """The gate before `train`."""
    words = [*job.preflight, "--nodes", str(len(hosts.slots)), "--gpus", str(max(map(len, hosts.slots.values())))]
    words += ["--head", str(hosts.meet.preflight), "--hosts", ",".join(hosts.slots)]
    if hosts.node_rank is not None:
        name = list(hosts.slots)[hosts.node_rank]
        return Command(after_setup(medpretrain([*words, "--name", name]), site), environment(site))
    exports = [f"export {name}={shlex.quote(value)}" for name, value in (_inherited() | environment(site)).items()]
    there = "; ".join([f"cd {shlex.quote(os.getcwd())}", *exports, *site.setup])
    # pdsh puts the host's name for %h.
    line = f"{there}; exec {shlex.join(medpretrain(words))} --name ".replace("%", "%%") + "%h"
    port = {"PDSH_SSH_ARGS_APPEND": f"-p {hosts.ssh_port}"} if hosts.ssh_port else {}
    return Command(["pdsh", "-S", "-R", "ssh", "-w", ",".join(hosts.slots), line], port)


def environment(site: Site) -> dict[str, str]:
    """What every process is given."""
    return {"OMP_NUM_THREADS": "1"} | site.environment


def write_files(job: Job, site: Site) -> None:
    """The files that DeepSpeed carries an environment in; every host must see them."""
    launch_folder(job.run_dir).mkdir(parents=True, exist_ok=True)
    lines = [f"{name}={value}\n" for name, value in environment(site).items()]
    environment_file(job.run_dir).write_text("".join(lines))
    setup_file(job.run_dir).write_text("".join(f"{line}\n" for line in site.setup))


def environment_file(run_dir: Path) -> Path:
    return launch_folder(run_dir) / "environment"


def setup_file(run_dir: Path) -> Path:
    return launch_folder(run_dir) / "setup.sh"


def secrets() -> list[str]:
    """The variables that DeepSpeed would carry to the other hosts, and that are nobody's business."""
    return sorted(name for name in os.environ if name.startswith(_CARRIED) and SECRET_NAMES.search(name))


def _inherited() -> dict[str, str]:
    """What DeepSpeed too takes from here to the other hosts, as far as preflight needs it."""
    return {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "NCCL"))}


def _refuse_unquotable(words: Sequence[str]) -> None:
    """DeepSpeed hands words to the other hosts' shells as they are."""
    for word in words:
        if re.search(r"""[\s'"`$&|;<>()*?\\]""", word):
            raise UserError(
                f"DeepSpeed cannot carry {word!r} to other hosts: without spaces and quotes ([0.5,1]) it can, "
                "or write it into a recipe file"
            )
