"""What the other tests here stand on: hosts have their names, links their speed, and what is lost is lost."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.sshd import start_sshd

pytestmark = pytest.mark.cluster
PYTHON = (sys.executable, "-S", "-c")
SERVE = """
import socket
server = socket.create_server(("", 7000))
print("ready", flush=True)
while True:
    one = server.accept()[0]
    got = 0
    while block := one.recv(1 << 16):
        got += len(block)
    one.sendall(str(got).encode())
    one.close()
"""
SEND = """
import socket, sys, time
began = time.monotonic()
one = socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[3]))
one.settimeout(20)
one.sendall(bytes(int(sys.argv[2])))
one.shutdown(socket.SHUT_WR)
assert int(one.recv(100)) == int(sys.argv[2])
print(time.monotonic() - began)
"""


def until(happens, timeout=10):
    deadline = time.monotonic() + timeout
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid):
    """And is no zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def send(sender, receiver, count, connect_s=5):
    return sender.run([*PYTHON, SEND, receiver.name, str(count), str(connect_s)])


def serve(host):
    process = host.start([*PYTHON, SERVE])
    until(lambda: "ready" in process.said())
    return process


def test_hosts_have_names_of_their_own_that_resolve_on_all_of_them(hosts):
    for host in hosts:
        assert host.run(["hostname"]).stdout.split() == [host.name]
        for other in hosts:
            assert host.run(["getent", "hosts", other.name]).stdout.split() == [other.address, other.name]
    assert hosts["a"].run(["getent", "hosts", "c"]).returncode == 2
    assert hosts["a"].run(["pwd"], cwd=Path("/tmp")).stdout == "/tmp\n"


def test_a_slow_link_lets_no_more_through_and_what_is_sent_is_counted(tmp_path):
    count = 1_000_000
    with Hosts(["a", "b"], tmp_path) as hosts:
        a, b = hosts
        a.slow(8)  # a megabyte a second
        for sender, receiver in ((a, b), (b, a)):
            server, before = serve(receiver), sender.bytes_sent()
            done = send(sender, receiver, count)
            assert done.returncode == 0, done.stderr
            assert float(done.stdout) > 0.9
            assert count < sender.bytes_sent() - before < 1.2 * count
            server.kill()


def test_of_a_lost_host_nothing_is_left_and_nothing_is_heard(tmp_path):
    with Hosts(["a", "b"], tmp_path) as hosts:
        a, b = hosts
        serve(b)
        daemon = b.start(["sh", "-c", "setsid sleep 1000 & echo $!"])
        daemon.wait()
        pid = int(daemon.said())
        assert send(a, b, 1).returncode == 0
        assert runs(pid)
        b.lose()
        assert not runs(pid)
        lost = send(a, b, 1, connect_s=1).stderr
        assert "TimeoutError" in lost or "No route to host" in lost, lost  # a process that ended is "refused"
        b.up()
        serve(b)
        assert send(a, b, 1).returncode == 0


def test_a_disk_of_one_host_is_full_and_a_folder_missing_on_one_alone(tmp_path):
    for name in ("disk", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("of all")
    with Hosts(["a", "b"], tmp_path) as hosts:
        a, b = hosts
        a.mount_tmpfs(tmp_path / "disk", "1m")
        b.hide(tmp_path / "data")
        fill = ["dd", "if=/dev/zero", f"of={tmp_path}/disk/more", "bs=1M", "count=2"]
        assert "No space left on device" in a.run(fill).stderr
        assert b.run(fill).returncode == 0
        seen = {host.name: host.run(["ls", tmp_path / "data", tmp_path / "disk"]).stdout.split() for host in hosts}
        assert seen == {
            "a": [f"{tmp_path}/data:", "file", f"{tmp_path}/disk:", "more"],
            "b": [f"{tmp_path}/data:", f"{tmp_path}/disk:", "file", "more"],
        }


def test_the_machine_is_as_it_was_when_hosts_are_closed(tmp_path):
    def machine():
        return [Path(f"/proc/self/{name}").read_text() for name in ("net/dev", "mountinfo")]

    def names():
        return [[line.split()[0] for line in text.splitlines()] for text in machine()]

    before = names()
    with Hosts(["a", "b"], tmp_path) as hosts:
        hosts["a"].mount_tmpfs(tmp_path)
        process = hosts["a"].start(["sleep", "1000"], log=tmp_path.with_suffix(".log"))
        assert names() == before
    assert process.returncode is not None
    assert names() == before


def test_ssh_and_pdsh_go_from_each_host_to_each_and_ask_nothing(hosts, tmp_path):
    start_sshd(hosts, tmp_path / "ssh")
    for host in hosts:
        for other in hosts:
            done = host.run(["ssh", other.name, "hostname"])
            assert (done.stdout, done.stderr) == (f"{other.name}\n", "")
    done = hosts["login"].run(["pdsh", "-R", "ssh", "-w", "a,b", "hostname"])
    assert sorted(done.stdout.splitlines()) == ["a: a", "b: b"]


def test_a_job_of_two_nodes_runs_on_both(slurm, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nsrun hostname\n")
    job = slurm.submit("--nodes=2", f"--output={tmp_path}/said", script)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert sorted((tmp_path / "said").read_text().split()) == ["a", "b"]
