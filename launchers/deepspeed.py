"""DeepSpeed's ranks on the hosts of a hostfile: by pdsh over ssh, or the same command on each host without ssh.

DeepSpeed's `deepspeed.launcher.launch` starts the ranks of a host. What brings it there is ours: DeepSpeed's runner
quotes no word, logs the variables that it carries, and leaves ranks behind when it is asked to leave.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_prep.errors import UserError
from launchers.command import Command, after_setup, medpretrain
from launchers.head import Head
from launchers.hostfile import Slots
from launchers.job import Job
from launchers.on_host import OVER_SSH, RANKS
from launchers.passwords import without_passwords
from launchers.pdsh import CONNECT_S, Pdsh, ssh, verbatim
from launchers.site import SECRET_NAMES, Site

PORT = 29500
"""Of the rendezvous; preflight meets at the one below."""
_CARRIED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of variables that hosts get from here, as by DeepSpeed."""


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
    modules = subprocess.run(["pdsh", "-V"], capture_output=True, text=True, check=False).stdout
    if "exec" not in modules:
        raise UserError(
            "pdsh has no module exec: install pdsh-rcmd-exec, or run the command on every host with --no-ssh"
        )

    def asked(host: str) -> str | None:
        words, limit = [*ssh(ssh_port), host, "true"], 2 * CONNECT_S
        try:
            answer = subprocess.run(words, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return f"{host} (no answer in {limit} s)"
        last = (answer.stderr.strip().splitlines() or [""])[-1]
        return f"{host} ({last or f'ssh ended with {answer.returncode}'})" if answer.returncode else None

    with ThreadPoolExecutor(32) as pool:
        failed = [said for said in pool.map(asked, hosts) if said]
    if failed:
        raise UserError(
            f"not to be reached by ssh: {'; '.join(failed)}. Mend it (`ssh HOST true` must end without a question), or "
            "leave hosts out with --exclude"
        )


def train(job: Job, site: Site, hosts: Hosts) -> Command:
    """The command of one host for all, or without ssh of each.

    Raises:
        UserError: the slots do not divide the global batch.
    """
    slots = hosts.slots.values()
    job.refuse_size(sum(map(len, slots)), " + ".join(str(len(of_host)) for of_host in slots) + " slots")
    world = base64.urlsafe_b64encode(json.dumps(hosts.slots).encode()).decode()
    ranks = [sys.executable, "-u", "-m", RANKS, f"--world_info={world}"]
    ranks += [f"--master_addr={hosts.meet.host}", f"--master_port={hosts.meet.port}"]
    run = ["--no_local_rank", "--module", "medpretrain", *job.train]
    if hosts.node_rank is None:
        return _over_ssh(site, hosts, [*map(verbatim, ranks), "--node_rank=%n", *map(verbatim, run)])
    return Command(after_setup(_on_host([*ranks, f"--node_rank={hosts.node_rank}", *run]), site), environment(site))


def preflight(job: Job, site: Site, hosts: Hosts) -> Command:
    """The gate before `train`.

    Raises:
        UserError: hosts have different numbers of slots, which it cannot rehearse.
    """
    sizes = {host: len(slots) for host, slots in hosts.slots.items()}
    if len(set(sizes.values())) > 1:
        named = ", ".join(f"{host} {size}" for host, size in sizes.items())
        raise UserError(
            f"preflight rehearses with as many processes on each host, but slots are: {named}. "
            "Choose as many of each with --include or --exclude, or go without the gate: --no-preflight"
        )
    words = [*job.preflight, "--nodes", str(len(sizes)), "--gpus", str(max(sizes.values()))]
    words += ["--head", str(hosts.meet.preflight), "--hosts", ",".join(sizes)]
    # What DeepSpeed does for its ranks: the chosen slots are the GPUs that are seen.
    chosen = {
        host: ",".join(map(str, slots)) for host, slots in hosts.slots.items() if slots != list(range(len(slots)))
    }
    if hosts.node_rank is None:
        cases = [f"{host}) export CUDA_VISIBLE_DEVICES={gpus};;" for host, gpus in chosen.items()]
        gate = [*map(verbatim, medpretrain(words)), "--name", "%h"]
        return _over_ssh(site, hosts, gate, [f"case %h in {' '.join(cases)} esac"] if cases else [])
    name = list(sizes)[hosts.node_rank]
    own = {"CUDA_VISIBLE_DEVICES": chosen[name]} if name in chosen else {}
    return Command(after_setup(medpretrain([*words, "--name", name]), site), environment(site) | own)


def environment(site: Site) -> dict[str, str]:
    """What every process is given."""
    return {"OMP_NUM_THREADS": "1"} | site.environment


def kept_here() -> list[str]:
    """The variables that the hosts would get from here, but for what their values would give away."""
    carried = {name: value for name, value in os.environ.items() if name.startswith(_CARRIED)}
    return sorted(
        name for name, value in carried.items() if SECRET_NAMES.search(name) or without_passwords(value) != value
    )


def _over_ssh(site: Site, hosts: Hosts, words: Sequence[str], last: Sequence[str] = ()) -> Pdsh:
    """
    Args:
        words: the command, as pdsh takes it.
        last: shell lines right before it, as pdsh takes them.
    """
    hidden = kept_here()
    carried = {name: value for name, value in os.environ.items() if name.startswith(_CARRIED) and name not in hidden}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in (carried | environment(site)).items()]
    there = [verbatim(line) for line in (f"cd {shlex.quote(os.getcwd())} || exit", *exports, *site.setup)]
    command = shlex.join([*map(verbatim, _on_host([OVER_SSH])), *words])
    return Pdsh(list(hosts.slots), "\n".join([*there, *last, f"exec {command}"]), hosts.ssh_port)


def _on_host(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "launchers.on_host", *words]
