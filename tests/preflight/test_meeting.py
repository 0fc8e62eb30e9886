"""Hosts that find each other, and what is said where they do not."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from data_prep.errors import UserError, WorkFailed
from launchers.head import Head
from medpretrain.preflight import meeting
from medpretrain.preflight.meeting import meet


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Head("127.0.0.1", probe.getsockname()[1])


@pytest.fixture
def both(address):
    """A head and one more."""
    return meet(address, "a", 2, 20), meet(address, "b", 2, 20)


@pytest.mark.parametrize("text", ["node1", "node1:", ":29400", "node1:port", "node1:0", "node1:70000"])
def test_an_address_that_is_none(text):
    with pytest.raises(UserError, match="HOST:PORT"):
        Head.parse(text)


def test_whoever_has_the_address_hosts_and_the_next_on_the_same_machine_joins(both):
    head, other = both
    assert (head.leads, other.leads, other.slot) == (True, False, 1)
    other.check_in({"name": "b", "facts": [1, None, "x"]})
    assert head.others(2, 10, lambda count: None) == ({1: {"name": "b", "facts": [1, None, "x"]}}, [])
    head.tell("met", True)
    assert other.hear("met", 10) is True


def test_those_that_came_are_known_though_others_did_not(both):
    head, other = both
    other.check_in({"name": "b"})
    began = time.monotonic()
    assert list(head.others(3, 0.5, lambda count: None)[0]) == [1]
    assert time.monotonic() - began < 10


def test_a_host_that_came_and_still_looks_at_itself_is_waited_for(both):
    head, other = both

    def look():
        for _ in range(4):
            time.sleep(0.4)
            other.sign()
        other.check_in({"name": "b"})

    thread = threading.Thread(target=look)
    thread.start()
    found, lost = head.others(2, 0.5, lambda count: None)
    thread.join()
    assert (list(found), lost) == ([1], [])


def test_a_host_that_came_and_was_lost_is_named(both, monkeypatch):
    monkeypatch.setattr(meeting, "SILENT_S", 1.0)
    assert both[0].others(2, 0.5, lambda count: None) == ({}, ["b"])


def test_a_head_that_falls_silent_is_lost_and_not_waited_for_without_end(monkeypatch, address):
    """As after a power cut: its connections stay, and nothing comes."""
    monkeypatch.setattr(meeting, "SILENT_S", 2.0)
    script = f"""
import time
from launchers.head import Head
from medpretrain.preflight import meeting
from medpretrain.preflight.meeting import meet
kept = meet(Head({address.host!r}, {address.port}), "a", 2, 60)
print("listens", flush=True)
time.sleep(120)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as head:
        try:
            assert head.stdout.readline() == "listens\n"
            other = meet(address, "b", 2, 20)
            other.sign()
            head.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(WorkFailed, match=r"b has lost the head .* \(it gave no answer for 2 s\)"):
                other.hear("met", math.inf)
            assert time.monotonic() - began < 20
        finally:
            head.kill()


def test_a_stranger_on_the_heads_port_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(meeting, "SILENT_S", 1.0)
    monkeypatch.setattr(meeting, "_listen", lambda head: None)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        where = Head("127.0.0.1", stranger.getsockname()[1])
        with pytest.raises(WorkFailed, match="is no head of a preflight: it says nothing for 1 s; take another port"):
            meet(where, "b", 2, 20)


def test_one_host_too_many_is_told_so(both, address):
    with pytest.raises(WorkFailed, match=r"c comes to .* as host number 3, and 2 are wanted"):
        meet(address, "c", 2, 20)


def test_a_clock_that_is_ahead_is_measured_within_the_round_trip(both):
    head, other = both

    def answer():
        for turn in range(9):
            other.hear(f"time/1/{turn}", 20, 0.001)
            other.tell(f"time/1/{turn}/answer", time.time() + 5.0)

    thread = threading.Thread(target=answer)
    thread.start()
    ahead, accuracy = head.ask_time(1)
    thread.join()
    assert abs(ahead - 5.0) <= accuracy < 2.0


def test_a_clock_that_agrees(both):
    head, other = both
    thread = threading.Thread(target=other.answer_time, args=(20,))
    thread.start()
    ahead, accuracy = head.ask_time(1)
    thread.join()
    assert abs(ahead) <= accuracy


def test_a_host_that_does_not_tell_its_time_in_time(both):
    assert both[0].ask_time(1, timeout_s=0.1) is None


def test_words_that_do_not_come(both):
    with pytest.raises(TimeoutError):
        both[1].hear("met", 0.1)


def test_a_head_that_does_not_run_is_named(monkeypatch):
    # An address of the documentation's range, which no machine has; the answer is the kernel's of a closed port.
    def refused(where, timeout):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(WorkFailed, match=r"b cannot reach the head 192.0.2.1:29400 \(Connection refused\), tried for"):
        meet(Head("192.0.2.1", 29400), "b", 2, 0.1)


def test_a_head_whose_name_does_not_resolve_is_named():
    with pytest.raises(WorkFailed, match=r"b cannot reach the head nowhere.invalid:29400 \("):
        meet(Head("nowhere.invalid", 29400), "b", 2, 0.1)
