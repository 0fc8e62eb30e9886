"""What runs on a host is asked to leave when nobody is left who started it, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOOP = "echo ready; while :; do sleep 0.05; done"
WAITS = f"trap 'sleep 0.3; echo committed; exit 75' TERM; {LOOP}"


@pytest.fixture
def on_host():
    """on_host(shell text, option, ...): the process of `launchers.on_host`; its standard input is a pipe."""
    started = []

    def start(text, *options):
        words = [sys.executable, "-m", "launchers.on_host", *options, "sh", "-c", text]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[2], text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.mark.parametrize(("text", "code"), [("exit 0", 0), ("exit 77", 77), ("kill -KILL $$", 137)])
@pytest.mark.parametrize("options", [(), ("--over-ssh",)])
def test_the_exit_code_is_the_commands(on_host, text, code, options):
    assert on_host(text, *options).wait(20) == code


def test_the_end_of_the_connection_is_a_request_to_leave(on_host):
    process = on_host(WAITS, "--over-ssh")
    assert process.stdout.readline() == "ready\n"
    process.stdin.close()
    assert process.stdout.readline() == "committed\n"
    assert process.wait(20) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_request_to_leave(on_host, number):
    process = on_host(WAITS)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "committed\n"
    assert process.wait(20) == 75


def test_without_ssh_the_end_of_standard_input_says_nothing(on_host):
    process = on_host("sleep 1; echo done")
    process.stdin.close()
    assert process.stdout.readline() == "done\n"
    assert process.wait(20) == 0


def test_a_process_that_speaks_while_nobody_listens_leaves_as_if_somebody_did(on_host, tmp_path):
    process = on_host(
        f"trap 'echo a; sleep 0.3; echo b && : > {tmp_path}/committed; exit 75' TERM; {LOOP}", "--over-ssh"
    )
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(20) == 75
    assert (tmp_path / "committed").exists()


def test_what_a_command_leaves_behind_is_ended_with_it(on_host):
    process = on_host("sleep 1000 & echo $!; exit 3")
    left = int(process.stdout.readline())
    assert process.wait(20) == 3
    deadline = time.monotonic() + 10
    while Path(f"/proc/{left}/cmdline").exists() and Path(f"/proc/{left}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_gate_is_told_of_signals_and_what_follows_it_does_not_run():
    script = f"""
from launchers.command import Command
code = Command(["sh", "-c", {WAITS!r}]).run()
print("gate", code, flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, cwd=Path(__file__).parents[2], text=True) as one:
        assert one.stdout.readline() == "ready\n"
        one.send_signal(signal.SIGTERM)
        assert one.stdout.readline() == "committed\n"
        assert one.stdout.readline() == "gate 75\n"
        assert one.wait(20) == 0
