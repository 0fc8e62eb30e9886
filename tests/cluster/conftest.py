"""Three hosts, `login`, `a` and `b`, and SLURM with the latter two as nodes; a module's tests share them."""

from __future__ import annotations

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(["login", "a", "b"], tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def slurm(hosts, tmp_path_factory):
    return Slurm(hosts, tmp_path_factory.mktemp("cluster") / "slurm", controller="login", grace=20)
