"""An sshd on each host, so that a bare `ssh HOST` goes from any of them to any other and asks nothing."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.cluster.hosts import Hosts, need

SERVER = """\
Port 22
HostKey {folder}/{name}
AuthorizedKeysFile {folder}/client.pub
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
UseDNS no
PrintMotd no
"""
CLIENT = """\
Host *
  IdentityFile {folder}/client
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  BatchMode yes
  ConnectTimeout 5
  GSSAPIAuthentication no
"""


def start_sshd(hosts: Hosts, folder: Path) -> None:
    """Returns when all of them answer. A session begins with a bare environment, as on any cluster.

    Args:
        folder: a new one, for keys and configuration.

    Raises:
        RuntimeError: no sshd is installed.
    """
    need("sshd", "ssh", "ssh-keygen")
    (folder / "client.d").mkdir(parents=True)
    _make_key(folder / "client")
    (folder / "client.d" / "hosts.conf").write_text(CLIENT.format(folder=folder))
    known = []
    for host in hosts:
        _make_key(folder / host.name)
        kind, key = (folder / f"{host.name}.pub").read_text().split()[:2]
        known.append(f"{host.name},{host.address} {kind} {key}\n")
        (folder / f"{host.name}.conf").write_text(SERVER.format(folder=folder, name=host.name))
    (folder / "known_hosts").write_text("".join(known))
    for host in hosts:
        host.bind(folder / "client.d", "/etc/ssh/ssh_config.d")
        if Path("/root/.ssh").exists():
            host.hide("/root/.ssh")
        host.run(["mkdir", "-p", "/run/sshd"])
        host.start(["/usr/sbin/sshd", "-D", "-e", "-f", folder / f"{host.name}.conf"])
    for host in hosts:
        deadline = time.monotonic() + 10
        while (done := host.run(["ssh", host.name, "true"])).returncode:
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.05)


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=30)
