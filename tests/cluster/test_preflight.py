"""`medpretrain preflight` between hosts: what is wrong is found before anything is trained, and the host is named."""

from __future__ import annotations

import json
import sys

import pytest

from tests.cluster.hosts import Hosts
from tests.faults.running import ROOT, committed, write_recipe

pytestmark = pytest.mark.cluster
MEDPRETRAIN = (sys.executable, "-m", "medpretrain")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def preflight(hosts, names, words, environments=None, expected=None):
    """The exit codes by host, and the table that the head, the first, wrote as JSON."""
    head, *_ = names
    table = words[0].with_name("table.json")
    options = ["--nodes", str(len(expected or names)), "--gpus", "1", "--head", f"{head}:29399"]
    options += ["--hosts", ",".join(expected or names), "--timeout", "30"]
    agents = {
        name: hosts[name].start(
            [*MEDPRETRAIN, "preflight", *words, *options, *(["--json", table] if name == head else [])],
            env=ENVIRONMENT | (environments or {}).get(name, {}),
        )
        for name in names
    }
    codes = {name: agent.wait(240) for name, agent in agents.items()}
    assert table.exists(), "".join(agent.said() for agent in agents.values())
    return codes, json.loads(table.read_text()), {name: agent.said() for name, agent in agents.items()}


def failing(table):
    """(check, host) of each row that fails."""
    return {(row["check"], row["host"]) for row in table["rows"] if row["status"] == "fail"}


def test_each_bad_host_is_named_with_what_is_wrong(small_dataset, tmp_path):
    """Another version, a full disk, an unreachable dataset and a host that is off, all at once."""
    recipe, run = write_recipe(tmp_path, small_dataset, 20), tmp_path / "run"
    run.mkdir()
    other = tmp_path / "other" / "timm-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 9.9.9\n")
    with Hosts(["good", "versions", "full", "blind", "off"], tmp_path) as hosts:
        hosts["full"].mount_tmpfs(run, "1m")
        assert hosts["full"].run(["dd", "if=/dev/zero", f"of={run}/fill", "bs=1M", "count=2"]).returncode
        hosts["blind"].hide(small_dataset)
        hosts["off"].down()
        codes, table, said = preflight(
            hosts,
            ["good", "versions", "full", "blind"],
            [recipe, f"run.dir={run}"],
            {"versions": {"PYTHONPATH": f"{other.parent}:{ROOT}"}},
            expected=["good", "versions", "full", "blind", "off"],
        )
    assert codes == dict.fromkeys(codes, 1)
    assert not table["passed"]
    assert failing(table) >= {
        ("hosts", "off"),
        ("packages", "versions"),
        ("checkpoint target", "full"),
        ("dataset", "blind"),
    }
    assert not [row for row in failing(table) if "good" in row[1]]
    rows = {(row["check"], row["host"]): row for row in table["rows"]}
    assert "9.9.9" in rows["packages", "versions"]["figures"]
    assert all(row["advice"] for row in rows.values() if row["status"] == "fail")
    assert "not measured" in json.dumps(table["rows"]), "nothing is rehearsed on hosts that cannot train"
    assert "timm 9.9.9" in said["versions"], "the host itself says it too"
    assert not list(run.iterdir()), "nothing stays"


def test_a_slow_link_is_measured_and_its_host_named(small_dataset, tmp_path):
    recipe = write_recipe(tmp_path, small_dataset, 20)
    with Hosts(["a", "b", "c"], tmp_path) as hosts:
        hosts["c"].slow(20)
        words = [recipe, f"run.dir={tmp_path / 'run'}", "train.global_batch=9"]
        codes, table, _ = preflight(hosts, ["a", "b", "c"], words)
    assert codes == dict.fromkeys("abc", 1)
    assert ("links", "c") in failing(table)
    assert not [row for row in failing(table) if row[1] in ("a", "b")]


def test_a_host_that_is_loopback_to_itself_is_named_and_trains_with_what_is_advised(small_dataset, tmp_path):
    """As Debian and Ubuntu install it."""
    recipe, run = write_recipe(tmp_path, small_dataset, 20), tmp_path / "run"
    launch = [*MEDPRETRAIN, "launch", "torchrun", recipe, f"run.dir={run}"]
    launch += ["--nodes", "2", "--gpus", "1", "--head", "a", "--hosts", "a,b"]
    with Hosts(["a", "b"], tmp_path) as hosts:
        table = tmp_path / "hosts-of-b"
        table.write_text(f"127.0.0.1 localhost\n127.0.1.1 b\n{hosts['a'].address} a\n")
        hosts["b"].bind(table, "/etc/hosts")

        for host in hosts:
            shown = host.run([*launch, "--dry-run"], env=ENVIRONMENT, cwd=tmp_path)
            assert f" --local-addr={host.address} " in shown.stdout, "what others are told is an address, not a name"

        def agents(**more):
            started = [host.start(launch, env=ENVIRONMENT | more, cwd=tmp_path) for host in hosts]
            return [agent.wait(240) for agent in started], started[0].said()

        codes, said = agents()
        assert codes == [1, 1]
        assert "look at b" in said
        assert "127.0.1.1" in said
        assert "GLOO_SOCKET_IFNAME" in said
        assert not run.exists()
        codes, said = agents(GLOO_SOCKET_IFNAME="eth0")
        assert codes == [0, 0], said[-3000:]
        assert "preflight of 2 hosts: " in said, "the gate"
    assert committed(run)[-1] == 20
