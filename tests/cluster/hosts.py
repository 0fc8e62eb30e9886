"""Hosts on one machine: network namespaces on a bridge, each with its own name, /etc/hosts, /run and /dev/shm.

They share the machine's file system, users and processes. Nothing of the machine is changed: namespaces have no names
and are gone with their last process, and interfaces exist within them only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages.txt")
INHERITED = ("SLURM_", "SBATCH_", "TORCHELASTIC_", "PET_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GLOO_", "SSH_")
"""Beginnings of variables that would tell a host's processes of another launcher."""

HOLD = """\
echo
read -r closed
for process in /proc/[0-9]*; do
    [ "$(readlink $process/ns/net)" = "$(readlink /proc/$$/ns/net)" ] &&
        [ $process != /proc/$$ ] && kill -9 ${process#/proc/}
done
"""


def need(*tools: str) -> None:
    """Raises:
    RuntimeError: this is not root, or a tool is missing. Where these tests run, they fail and are not skipped.
    """
    if os.geteuid() != 0:
        raise RuntimeError("tests of clusters make network namespaces: run them as root")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}; apt-get install $(cat {PACKAGES})")


class Process(subprocess.Popen):
    """In a session and process group of its own; what it says goes to `log`."""

    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """To it alone, as by `kill PID`."""
        self.send_signal(number)

    def kill(self) -> None:
        """It and its group."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


class Host:
    """One of `Hosts`.

    Attributes:
        name: its host name, which the others resolve.
        address: IPv4, on the bridge.
    """

    def __init__(self, name: str, address: str, folder: Path, bridge: int) -> None:
        self.name, self.address = name, address
        self._folder, self._bridge, self._started = folder, bridge, list[Process]()
        self._holder = holder()
        self._enter = ["nsenter", f"--target={self._holder.pid}", "--net", "--mount", "--uts"]

    def start(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> Process:
        """Start a command here.

        Args:
            env: more variables; the others are those of the test, but for those of a launcher.
            log: for its standard output and error.
        """
        log = log or self._folder / f"{self.name}-{len(self._started)}.log"
        with log.open("ab") as said:
            process = Process(
                self._words(argv, cwd),
                env=self._environment(env),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        process.log = log
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | Path],
        timeout: float = 30,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """What a command here came to; an AssertionError where it took more than `timeout` seconds."""
        with subprocess.Popen(
            self._words(argv, cwd),
            env=self._environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                words = " ".join(map(str, argv))
                raise AssertionError(f"{words}: not done after {timeout} s\n{out}\n{err}") from None
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def _words(self, argv: Sequence[str | Path], cwd: Path | None) -> list[str]:
        # Entering a mount namespace leads to its root, so the working folder is given again.
        return [*self._enter, "env", f"--chdir={cwd or Path.cwd()}", *map(str, argv)]

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
        return kept | {"HOSTNAME": self.name} | dict(more or {})

    def down(self) -> None:
        """Pull its cable: what it sends is lost without a word, as is what is sent to it."""
        within(self._bridge, "ip", "link", "set", f"to-{self.name}", "down")

    def up(self) -> None:
        within(self._bridge, "ip", "link", "set", f"to-{self.name}", "up")

    def lose(self) -> None:
        """As by a power cut: nothing says goodbye. After `up` it is a fresh host that has the same name."""
        self.down()
        self.end()

    def slow(self, mbit: float) -> None:
        """Let no more than this many megabits a second in, and as many out."""
        burst = max(16_384, int(mbit * 1e6 / 8 / 100))
        # A deep queue, so that little is dropped, sent again and counted twice.
        limit = ["root", "tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "1s"]
        within(self._bridge, "tc", "qdisc", "replace", "dev", f"to-{self.name}", *limit)
        within(self._holder.pid, "tc", "qdisc", "replace", "dev", "eth0", *limit)

    def unslow(self) -> None:
        """Take back what `slow` did."""
        within(self._bridge, "tc", "qdisc", "delete", "dev", f"to-{self.name}", "root")
        within(self._holder.pid, "tc", "qdisc", "delete", "dev", "eth0", "root")

    def bytes_sent(self) -> int:
        """To other hosts, with all headers, since it was made."""
        table = Path(f"/proc/{self._holder.pid}/net/dev").read_text()
        row = next(line for line in table.splitlines() if line.strip().startswith("eth0:"))
        return int(row.partition(":")[2].split()[8])

    def mount_tmpfs(self, path: Path | str, size: str = "16m") -> None:
        """A file system of its own at a folder, which only processes of this host see that start from now on, or run.

        Args:
            size: as in `16m`; writing more raises "No space left on device".
        """
        self._mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(path))

    def hide(self, path: Path | str) -> None:
        """Let a folder be empty here."""
        self.mount_tmpfs(path)

    def bind(self, source: Path, path: Path | str) -> None:
        """Let a file or a folder stand at `path` here."""
        self._mount("--bind", str(source), str(path))

    def _mount(self, *words: str) -> None:
        done = self.run(["mount", *words])
        assert done.returncode == 0, done.stderr

    def end(self) -> None:
        """SIGKILL to all its processes, those that became daemons too: they are in its network namespace."""
        for process in self._started:
            process.kill()  # one that was started just now may not have entered the namespace yet
        deadline = time.monotonic() + 10
        namespace = os.stat(f"/proc/{self._holder.pid}/ns/net").st_ino
        while left := [pid for pid in _processes(namespace) if pid != self._holder.pid]:
            assert time.monotonic() < deadline, f"processes of {self.name} do not end: {left}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def close(self) -> None:
        self.end()
        self._holder.kill()
        self._holder.communicate()


class Hosts:
    """Hosts that see each other and nothing else.

    Args:
        names: of the hosts, which resolve on all of them.
        folder: for the logs of their processes.

    Raises:
        RuntimeError: this is not root, or a tool is missing.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        need("ip", "tc", "nsenter", "unshare", "mount")
        self._hosts: dict[str, Host] = {}
        self._bridge = holder()
        try:
            within(self._bridge.pid, "ip", "link", "add", "bridge", "type", "bridge", "stp_state", "0")
            within(self._bridge.pid, "ip", "link", "set", "bridge", "up")
            table = folder / "hosts"
            for number, name in enumerate(names, 1):
                self._hosts[name] = Host(name, f"10.77.0.{number}", folder, self._bridge.pid)
            lines = [f"{host.address} {host.name}\n" for host in self]
            table.write_text("127.0.0.1 localhost\n" + "".join(lines))
            for host in self:
                self._connect(host, table)
        except BaseException:
            self.close()
            raise

    def _connect(self, host: Host, table: Path) -> None:
        own, bridge = host._holder.pid, self._bridge.pid
        peer = ["peer", "name", "eth0", "netns", str(own)]
        within(bridge, "ip", "link", "add", f"to-{host.name}", "type", "veth", *peer)
        within(bridge, "ip", "link", "set", f"to-{host.name}", "master", "bridge", "up")
        within(own, "ip", "link", "set", "lo", "up")
        within(own, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        within(own, "ip", "link", "set", "eth0", "up")
        assert host.run(["hostname", host.name]).returncode == 0
        host.bind(table, "/etc/hosts")
        host.mount_tmpfs("/run")  # sockets and process ids of one host's services are not another's
        host.mount_tmpfs("/dev/shm", "1g")

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def close(self) -> None:
        """End every process of theirs, and with them the namespaces."""
        for host in self:
            host.close()
        self._bridge.kill()
        self._bridge.communicate()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holder() -> subprocess.Popen[bytes]:
    """A process that holds new namespaces. Should this one be killed, whose pipe it reads, it ends what is in them."""
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", "--uts", "sh", "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError("unshare made no namespaces; is this a container without CAP_SYS_ADMIN?")
    return process


def within(pid: int, *words: str) -> None:
    """Run a command in a process's network namespace."""
    done = subprocess.run(["nsenter", f"--target={pid}", "--net", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _processes(namespace: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                if os.stat(entry / "ns/net").st_ino == namespace:
                    yield int(entry.name)
