"""The command that each host runs: what torchrun needs to outlive a worker and a node is in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from string import Template

import pytest

from data_prep.errors import UserError
from launchers import torchrun
from launchers.command import Command
from launchers.head import Head
from launchers.site import Site
from launchers.torchrun import Nodes


def test_several_hosts_meet_at_the_head_with_what_survives_a_loss(job):
    command = torchrun.train(
        replace(job, global_batch=96), Site(), nodes=Nodes(2, 4), gpus=4, head=Head("gpu01", torchrun.PORT)
    )
    words = list(command.words)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nnodes=2:4", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=gpu01:29400"} <= set(words)
    assert "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3" in words
    assert any(word.startswith("--signals-to-handle=") and word.endswith(",SIGUSR1") for word in words)
    assert words[-5:] == ["-m", "medpretrain", *job.train][-5:]
    assert command.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(command.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 300, "a checkpoint takes longer than 30 s"


def test_others_are_told_an_address_and_not_a_name(job):
    """A name may be unknown to them. That of hosts with addresses is shown in tests/cluster."""

    def told(host):
        words = torchrun.train(job, Site(), nodes=Nodes(2, 2), gpus=8, head=Head(host, torchrun.PORT)).words
        return [word for word in words if word.startswith("--local-addr=")]

    assert not told("127.0.0.1")
    assert not told("nowhere.invalid")
    try:
        own = next(where[0] for *_, where in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET))
    except OSError:
        own = "127.0.0.1"
    assert told(own) == ([] if own.startswith("127.") else [f"--local-addr={own}"])


def test_torchrun_itself_takes_these_words(job):
    run = pytest.importorskip("torch.distributed.run")
    command = torchrun.train(
        replace(job, global_batch=96), Site(), nodes=Nodes(2, 4), gpus=4, head=Head("gpu01", 30000)
    )
    parsed = run.parse_args(list(command.words)[3:])
    config, _, arguments = run.config_from_args(parsed)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 4, 4)
    assert config.rdzv_endpoint == "gpu01:30000"
    assert config.rdzv_configs["keep_alive_max_attempt"] in (3, "3")
    assert arguments[-len(job.train) :] == job.train


def test_a_dollar_arrives_as_a_dollar(job):
    """torchrun takes the words of its processes for templates."""
    words = torchrun.train(replace(job, recipe="$a.yaml"), Site(), nodes=Nodes(1, 1), gpus=8, head=None).words
    assert Template(words[words.index("train") + 1]).safe_substitute(a="b") == "$a.yaml"


def test_one_host_meets_itself_on_a_free_port(job):
    words = torchrun.train(job, Site(), nodes=Nodes(1, 1), gpus=8, head=None).words
    assert "--standalone" in words
    assert not any("rdzv" in word for word in words)


def test_each_size_of_an_elastic_run_must_divide_the_batch(job):
    with pytest.raises(UserError, match=r"3 nodes x 8 processes = 24 do not divide train.global_batch=64"):
        torchrun.train(job, Site(), nodes=Nodes(2, 4), gpus=8, head=Head("gpu01", torchrun.PORT))


def test_micro_batches_count(job):
    with pytest.raises(UserError, match=r"= 16 x 8 micro-batches do not divide .*; possible are 8 processes, or"):
        torchrun.train(
            replace(job, micro_batches=8), Site(), nodes=Nodes(2, 2), gpus=8, head=Head("gpu01", torchrun.PORT)
        )


def test_several_hosts_need_a_head(job):
    with pytest.raises(UserError, match="--head HOST, the same on every host"):
        torchrun.train(job, Site(), nodes=Nodes(2, 2), gpus=8, head=None)


def test_a_head_that_does_not_resolve_is_said_before_torchrun_says_it():
    with pytest.raises(UserError, match=r"--head no-such-host.invalid: this host cannot resolve the name"):
        Head("no-such-host.invalid", torchrun.PORT).refuse_unknown()


@pytest.mark.parametrize("text", ["", "x", "0", "4:2", "2:", "-1"])
def test_a_number_of_nodes_that_does_not_read_is_refused(text):
    with pytest.raises(UserError, match="--nodes"):
        Nodes.parse(text)


def test_preflight_knows_the_hosts_and_where_they_meet(job):
    gate = torchrun.preflight(job, Site(), nodes=Nodes(2, 2), gpus=4, head=Head("a", torchrun.PORT), hosts=["a", "b"])
    assert list(gate.words)[-8:] == ["--gpus", "4", "--nodes", "2", "--head", "a:29399", "--hosts", "a,b"]


def test_a_host_that_may_come_later_looks_at_itself_only(job):
    gate = torchrun.preflight(job, Site(), nodes=Nodes(1, 2), gpus=4, head=Head("a", torchrun.PORT))
    assert list(gate.words)[-3:] == ["--gpus", "4", "--local"]


def test_a_printed_command_is_what_runs(job, tmp_path):
    """A shell takes what --dry-run prints, and hands over the same words and variables, after the site's own lines."""
    site = Site(environment={"NCCL_SOCKET_IFNAME": "ib 0"}, setup=("export FROM_SETUP=$((1 + 1))",))
    command = torchrun.train(job, site, nodes=Nodes(1, 1), gpus=8, head=None)
    show = "import os, sys; print(sys.argv[1:], os.environ['NCCL_SOCKET_IFNAME'], os.environ['FROM_SETUP'])"
    words = [word.replace(sys.executable, "REPLACED") for word in command.words]
    words = [piece for word in words for piece in ([sys.executable, "-c", show] if word == "REPLACED" else [word])]
    shown = str(Command(words, command.environment))
    answer = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True, env=dict(os.environ))
    expected = list(command.words)[list(command.words).index(sys.executable) + 1 :]
    assert answer.stdout == f"{expected} ib 0 2\n"
