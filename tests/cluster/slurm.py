"""SLURM on hosts: munged and slurmctld on one of them, a slurmd on each of the others."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.hosts import Host, Hosts, Process, need

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
SlurmctldPort=17817
SlurmdPort=17818
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_wait}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
PropagateResourceLimits=NONE
SlurmdTimeout={timeout}
KillWait={kill_wait}
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
MinJobAge=3600
NodeName={nodes} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


class Slurm:
    """A cluster with the partitions `batch`, the default, and `urgent`, which takes nodes from it.

    Args:
        folder: a new one, for configuration, state and logs.
        controller: the host where slurmctld is and jobs are submitted; it is no node and must not be lost.
        cpus: of a node, as SLURM is told.
        timeout: seconds after which a node that does not answer is down, and its jobs are requeued.
        kill_wait: seconds between SIGTERM and SIGKILL.
        grace: seconds between SIGTERM and the requeue of a job that another takes the nodes of.
        requeue_wait: seconds that a requeued job waits before it may start; 120 by default in SLURM.

    Raises:
        RuntimeError: SLURM is not installed.
    """

    def __init__(
        self,
        hosts: Hosts,
        folder: Path,
        controller: str,
        *,
        cpus: int = 2,
        timeout: int = 10,
        kill_wait: int = 5,
        grace: int = 0,
        requeue_wait: int = 15,
    ) -> None:
        need("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
        folder.mkdir(parents=True)
        self.controller, self.folder = hosts[controller], folder
        self.nodes = [host for host in hosts if host.name != controller]
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                controller=controller,
                folder=folder,
                nodes=",".join(host.name for host in self.nodes),
                cpus=cpus,
                timeout=timeout,
                kill_wait=kill_wait,
                grace=grace,
                requeue_wait=requeue_wait,
            )
        )
        (folder / "state").mkdir()
        self.environment = {"SLURM_CONF": str(self.configuration)}
        self._start_munged()
        self._daemons = [self._start(self.controller, "slurmctld")]
        for host in self.nodes:
            self.start_node(host)
        self.wait_for_nodes("idle", [host.name for host in self.nodes])

    def _start_munged(self) -> None:
        key, files = self.folder / "munge.key", self.folder / "munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # One is enough, for a socket in a folder is seen from all hosts. --force: its folder is root's alone.
        process = self.controller.start(
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={files}.socket"]
            + [f"--{name}-file={files}.{name}" for name in ("pid", "log", "seed")],
            log=self.folder / "munged.log",
        )
        deadline = time.monotonic() + 10
        while not Path(f"{files}.socket").exists():
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline, process.said()
            time.sleep(0.02)

    def start_node(self, host: Host) -> None:
        """Its slurmd; also of a host that was lost and is up again."""
        self._daemons.append(self._start(host, "slurmd"))

    def _start(self, host: Host, daemon: str) -> Process:
        return host.start([daemon, "-D"], env=self.environment, log=self.folder / f"{daemon}-{host.name}.log")

    def run(
        self,
        *argv: str | Path,
        timeout: float = 30,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command of SLURM's, or any, on the controller."""
        return self.controller.run(argv, timeout, self.environment | dict(env or {}), cwd)

    def submit(self, *words: str | Path, cwd: Path | None = None) -> int:
        """The number of a job that `sbatch *words` accepts."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def show(self, job: int) -> dict[str, str]:
        """Of a job, as `scontrol show job`: JobState, Reason, Restarts, ExitCode, NodeList, BatchHost, ..."""
        done = self.run("scontrol", "show", "job", "-o", str(job))
        assert done.returncode == 0, done.stderr
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def state(self, job: int) -> str:
        """As in PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL."""
        return self.show(job)["JobState"]

    def wait(self, job: int, *states: str, timeout: float = 60) -> str:
        """Until the job is in one of the states, which is returned."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} and not {' or '.join(states)}: {self.show(job)}"
            time.sleep(0.1)
        return state

    def node_states(self) -> dict[str, str]:
        done = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T")
        return dict(line.split() for line in done.stdout.splitlines())

    def wait_for_nodes(self, state: str, names: Sequence[str], timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while any(self.node_states().get(name) != state for name in names):
            logs = "".join(each.said()[-1500:] for each in self._daemons)
            assert self._daemons[0].poll() is None, f"slurmctld ended: {logs}"
            assert time.monotonic() < deadline, f"{self.node_states()}\n{logs}"
            time.sleep(0.1)
