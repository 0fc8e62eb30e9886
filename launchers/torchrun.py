"""torchrun on one host or many: the same command on each, and a run that outlives workers and nodes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from launchers.command import Command, after_setup, medpretrain
from launchers.head import Head
from launchers.job import Job
from launchers.site import Site

PORT = 29400
"""Of the rendezvous, on the head; preflight meets at the one below."""
SHUTDOWN_S = 600
"""How long workers that were asked to leave may write their checkpoint; torchrun's own is 30 s."""

END_AGENT = "MEDPRETRAIN_END_AGENT"
"""A variable that lets a process end its torchrun where a restart would come to the same."""

# Without it a restarted worker waits for ever for a store that its agent shares no more, and a node cannot come back.
SURVIVE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S)}
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True)
class Nodes:
    """Between `least` and `most` hosts."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Nodes:
        """
        >>> Nodes.parse("4"), Nodes.parse("2:4")
        (Nodes(least=4, most=4), Nodes(least=2, most=4))

        Raises:
            UserError: neither N nor MIN:MAX.
        """
        first, colon, last = text.partition(":")
        if not first.isdecimal() or (colon and not last.isdecimal()):
            raise UserError(f"--nodes {text}: give a number, or a range such as 2:4")
        least, most = int(first), int(last or first)
        if not 1 <= least <= most:
            raise UserError(f"--nodes {text}: at least 1, and the larger number last")
        return cls(least, most)

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"


def environment(site: Site) -> dict[str, str]:
    """What every process is given; variables that are set already win, but for the site's own."""
    defaults = {**SURVIVE, END_AGENT: "1", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in defaults.items() if name not in os.environ} | site.environment


def train(job: Job, site: Site, *, nodes: Nodes, gpus: int, head: Head | None, restarts: int = 100) -> Command:
    """The command that each host runs.

    Args:
        gpus: processes on each host.
        head: needed for more than one host.
        restarts: by torchrun, each from the newest checkpoint; a run that gets no further is stopped by its own count.

    Raises:
        UserError: no head, or sizes that do not divide the global batch.
    """
    for size in range(nodes.least, nodes.most + 1):
        job.refuse_size(size * gpus, f"{size} nodes x {gpus} processes")
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}", f"--max-restarts={restarts}"]
    if nodes.most == 1:
        words.append("--standalone")
    else:
        if head is None:
            raise UserError("more than one host needs a place to meet: --head HOST, the same on every host")
        # A node that is gone is gone after 3 s, and the others wait 5 s for more before they go on.
        patience = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
        words += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}", f"--rdzv-conf={patience}"]
        words.append(f"--rdzv-id={rendezvous_id(job.run_dir)}")
        # torchrun tells the others this host's name, which they may not know, or know as another network's.
        words += [f"--local-addr={address}"] if (address := head.address_here()) else []
    return Command(
        after_setup([*words, SIGNALS, "-m", "medpretrain", *job.train_under_torchrun], site), environment(site)
    )


def preflight(
    job: Job, site: Site, *, nodes: Nodes, gpus: int, head: Head | None, hosts: Sequence[str] = ()
) -> Command:
    """The gate before `train`, on each host. A host that may come or go looks at itself only."""
    words = [*job.preflight, "--gpus", str(gpus)]
    if nodes.least != nodes.most:
        words.append("--local")
    elif nodes.most > 1:
        assert head is not None
        words += ["--nodes", str(nodes.most), "--head", str(head.preflight)]
        words += ["--hosts", ",".join(hosts)] if hosts else []
    return Command(after_setup(medpretrain(words), site), environment(site))


def rendezvous_id(run_dir: Path) -> str:
    """The same on every host, another for every run folder."""
    return "medpretrain-" + hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]
