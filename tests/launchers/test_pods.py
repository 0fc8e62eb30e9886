"""The commands of the manifests, really run: read from the YAML, expanded as Kubernetes does, started."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from string import Template

import pytest
from ruamel.yaml import YAML

from launchers.job import Job, PrepJob
from launchers.kubectl import to_yaml
from launchers.kubernetes import job_set, prep_job, train_job
from launchers.pods import verbatim
from launchers.site import Kubernetes, Site, Volume

SITE = Site(
    image="registry.example/medpretrain:1",
    environment={"PRICE": "$5 $(NAME) $$", "YES": "yes", "OCTAL": "0777"},
    setup=("export FROM_SETUP='a b'",),
    kubernetes=Kubernetes(volumes=(Volume(claim="runs", path="/runs"),)),
)
OVERRIDES = (
    "data.path=[/data/a,/data/b]",
    "views.global.crop=[0.5, 1]",
    "run.dir=/runs/a run",
    'note=it\'s "so" $HOME $(PRICE) $$ `id` \\ #; & * $local_rank ${local_rank}',
)
JOB = Job("dino", "dino", OVERRIDES, Path("/runs/a run"), 512, options=("--resume", "never"))
RECORDER = """\
#!{python}
import json, os, signal, sys, time
name = os.path.basename(sys.argv[0])
def note(what):
    with open({log!r}, "a") as log:
        log.write(json.dumps([name, sys.argv[1:], what, dict(os.environ)]) + "\\n")
def leave(*_):
    note("asked to leave")
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
note("started")
if name == os.environ.get("FAKE_WAITS"):
    time.sleep(60)
if name == "getent":
    sys.exit(0 if sum(1 for _ in open({log!r})) > 1 else 2)
sys.exit(int(os.environ.get("FAKE_EXIT", "0")) if name == "python" else 0)
"""


class Container:
    """A container's command as a process; stand-ins for python, torchrun and getent note how they are called."""

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.folder = folder
        self.log, self.shm, self.bin = folder / "log.jsonl", folder / "shm", folder / "bin"
        self.shm.mkdir()
        self.bin.mkdir()
        for name in ("python", "torchrun", "getent"):
            (self.bin / name).write_text(RECORDER.format(python=sys.executable, log=str(self.log)))
            (self.bin / name).chmod(0o755)
        # As kubectl reads it: YAML 1.1.
        yaml = YAML(typ="safe", pure=True)
        yaml.version = (1, 1)
        (self.manifest,) = yaml.load_all(to_yaml(manifest))

    def start(self, **variables: str) -> subprocess.Popen[str]:
        spec = self.manifest["spec"]
        container = spec.get("trainer")
        if container is None:
            job = spec["replicatedJobs"][0]["template"]["spec"] if "replicatedJobs" in spec else spec
            container = job["template"]["spec"]["containers"][0]
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", **variables}
        for entry in container.get("env", ()):
            if "value" in entry:
                env[entry["name"]] = expanded(entry["value"], env)
        words = [expanded(word, env) for word in container["command"]]
        # The shared memory of a pod is its own.
        words = [word.replace("/dev/shm", str(self.shm)) for word in words]
        return subprocess.Popen(
            words, env=env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, **variables: str) -> int:
        process = self.start(**variables)
        said, _ = process.communicate(timeout=60)
        print(said)
        return process.returncode

    def calls(self, name: str = "") -> list[list]:
        held = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [call for call in held if call[0] == name or (not name and call[0] != "getent")]


def expanded(text: str, env: dict[str, str]) -> str:
    """$(NAME) and $$ in commands and variables, as Kubernetes documents them: what is not known stays."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)", lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]), text, flags=re.S
    )


TRAINER = {
    # What Kubeflow Trainer injects, and the fields of a pod.
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "dino-node-0-0.dino",
    "PET_MASTER_PORT": "29500",
    "POD_IP": "10.0.0.7",
}
JOBSET = {"PET_NODE_RANK": "1", "POD_IP": "10.0.0.7"}


def containers(folder: Path, kind: str, **options: bool) -> tuple[Container, dict[str, str]]:
    make, variables = {"TrainJob": (train_job, TRAINER), "JobSet": (job_set, JOBSET)}[kind]
    return Container(folder, make(JOB, SITE, nodes=2, gpus=8, name="dino", **options)), variables


BOTH = pytest.mark.parametrize("kind", ["TrainJob", "JobSet"])


@BOTH
def test_every_override_arrives_as_it_was_given(kind, tmp_path):
    container, variables = containers(tmp_path, kind)
    assert container.run(**variables) == 0
    preflight, torchrun = container.calls()
    gate = ["--nodes", "2", "--gpus", "8", "--head", "dino-node-0-0.dino:29399", "--timeout", "900"]
    gate += ["--name", "node-1", "--hosts", "node-0,node-1"]
    assert preflight[1] == ["-m", "medpretrain", *JOB.preflight, *gate]
    assert preflight[1][3:][: len(OVERRIDES) + 1] == ["dino", *OVERRIDES]
    # torchrun makes templates of the words for its processes.
    assert [Template(word).safe_substitute(local_rank="0") for word in torchrun[1]] == [
        *(
            "--nnodes",
            "2",
            "--nproc-per-node",
            "8",
            "--max-restarts",
            "3",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "dino",
        ),
        *("--rdzv-endpoint", "dino-node-0-0.dino:29400", "--rdzv-conf", "is_host=false", "--local-addr", "10.0.0.7"),
        *("-m", "medpretrain", "train", "dino", *OVERRIDES, "--resume", "never"),
    ]
    env = torchrun[3]
    assert (env["PRICE"], env["YES"], env["OCTAL"]) == ("$5 $(NAME) $$", "yes", "0777")
    assert env["FROM_SETUP"] == "a b"
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize("nodes", [1, 4, 128])
def test_the_gate_knows_every_pod_by_the_name_that_it_gives_itself(shell, nodes, tmp_path):
    """Or a dead pod is "1 of 4 did not answer"."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    container, variables = containers(tmp_path, "TrainJob")
    (container.bin / "sh").symlink_to(shutil.which(shell))
    own = []
    for rank in (0, nodes - 1):
        assert container.run(**variables | {"PET_NNODES": str(nodes), "PET_NODE_RANK": str(rank)}) == 0
        (container.shm / "preflight-passed").unlink()
        words = container.calls("python")[-1][1]
        assert words[words.index("--hosts") + 1] == ",".join(f"node-{number}" for number in range(nodes))
        own.append(words[words.index("--name") + 1])
    assert own == ["node-0", f"node-{nodes - 1}"]


def test_the_first_pod_alone_hosts_the_rendezvous(tmp_path):
    container, variables = containers(tmp_path, "TrainJob")
    assert container.run(**variables | {"PET_NODE_RANK": "0"}) == 0
    assert "is_host=true" in container.calls("torchrun")[0][1]


def test_a_pod_waits_for_the_name_of_the_first(tmp_path):
    container, variables = containers(tmp_path, "TrainJob")
    assert container.run(**variables) == 0
    assert [call[1] for call in container.calls("getent")] == [["hosts", "dino-node-0-0.dino"]] * 2
    assert container.calls()  # and went on


@BOTH
@pytest.mark.parametrize("code", [1, 2])
def test_nothing_trains_behind_a_closed_gate_and_its_code_is_the_pods(kind, code, tmp_path):
    """2, a user's error, must come out as 2: the podFailurePolicy ends the run at it."""
    container, variables = containers(tmp_path, kind)
    assert container.run(**variables, FAKE_EXIT=str(code)) == code
    assert not container.calls("torchrun")
    assert container.run(**variables) == 0  # and it is asked again
    assert len(container.calls("python")) == 2


def test_a_container_that_starts_again_in_its_pod_does_not_wait_for_the_others(tmp_path):
    container, variables = containers(tmp_path, "TrainJob")
    assert container.run(**variables) == container.run(**variables) == 0
    assert [call[0] for call in container.calls()] == ["python", "torchrun", "torchrun"]


def test_without_preflight_training_begins_at_once(tmp_path):
    container, variables = containers(tmp_path, "JobSet", preflight=False)
    assert container.run(**variables) == 0
    assert [call[0] for call in container.calls()] == ["torchrun"]


@pytest.mark.parametrize("waiting", ["python", "torchrun"])
def test_a_request_to_leave_reaches_what_runs(waiting, tmp_path):
    """A shell that is a container's first process ignores SIGTERM by default, until the kubelet kills it."""
    container, variables = containers(tmp_path, "TrainJob")
    process = container.start(**variables, FAKE_WAITS=waiting)
    until = time.monotonic() + 30
    while not container.calls(waiting) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert container.calls(waiting)[-1][2] == "asked to leave"
    assert process.returncode == (143 if waiting == "python" else 75)
    assert bool(container.calls("torchrun")) == (waiting == "torchrun")


def test_parts_of_a_preparation_are_one_to_n_and_each_once(tmp_path):
    words = ("images", "/data/my images", "/runs/shards", "--split", "train=0.7,test=0.3", "--note", "$(PRICE) it's")
    container = Container(tmp_path, prep_job(PrepJob(words, 4, words[2]), SITE, name="prep"))
    for index in range(container.manifest["spec"]["completions"]):
        assert container.run(JOB_COMPLETION_INDEX=str(index)) == 0
    prefix = ["-m", "medpretrain", "prep", *words, "--part"]
    assert [call[1] for call in container.calls()] == [[*prefix, f"{part}/4"] for part in (1, 2, 3, 4)]
    assert container.run(JOB_COMPLETION_INDEX="0", FAKE_EXIT="2") == 2


@pytest.mark.parametrize("text", ["$", "$$", "$(", "$(A)", "$$(A)", "$$$(A)", "$A", "a$", "$($$)", "\n$(A\n)"])
def test_kubernetes_makes_of_it_what_was_meant(text):
    assert expanded(verbatim(text), {"A": "wrong", "A\n": "wrong"}) == text


STAND_IN = """\
import json, os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")
out = Path(os.environ["OUT"])
(out / f"rank{os.environ['RANK']}.json").write_text(json.dumps([sys.argv[1:], {n: os.environ[n] for n in names}]))
"""


@pytest.mark.distributed
def test_real_torchruns_of_two_pods_find_each_other(tmp_path):
    """Only the trained module is a stand-in: torchrun takes these options, and the second pod waits for the first."""
    (tmp_path / "medpretrain").mkdir()
    (tmp_path / "medpretrain" / "__main__.py").write_text(STAND_IN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    manifest = job_set(JOB, SITE, nodes=2, gpus=2, name="dino", preflight=False)
    processes = []
    try:
        for rank in (1, 0):
            folder = tmp_path / f"pod{rank}"
            folder.mkdir()
            container = Container(folder, manifest)
            container.bin.joinpath("torchrun").unlink()
            container.bin.joinpath("torchrun").symlink_to(Path(sys.executable).parent / "torchrun")
            script = container.manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            (held,) = script["containers"]
            # Two pods on one machine: one port that is free, an address that is known.
            held["command"][2] = held["command"][2].replace(":29400", f":{port}")
            for entry in held["env"]:
                if entry["name"] == "PET_MASTER_ADDR":
                    entry["value"] = "localhost"
            variables = {"PET_NODE_RANK": str(rank), "POD_IP": "127.0.0.1", "OUT": str(tmp_path)}
            processes.append(container.start(**variables, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1"))
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    rows = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert all(words == ["train", "dino", *OVERRIDES, "--resume", "never"] for words, _ in rows)
    assert {env["WORLD_SIZE"] for _, env in rows} == {"4"}
    assert {env["MASTER_ADDR"] for _, env in rows} == {"127.0.0.1"}
    assert sorted(env["LOCAL_RANK"] for _, env in rows) == ["0", "0", "1", "1"]
    assert {env["TORCHELASTIC_RUN_ID"] for _, env in rows} == {"dino"}


def test_the_shells_of_images_take_the_scripts(tmp_path):
    """dash is Debian's sh, bash is others'; both must parse what is written for either."""
    shells = [path for path in (shutil.which("dash"), shutil.which("bash")) if path]
    assert shells
    for manifest in (
        train_job(JOB, SITE, nodes=2, gpus=8, name="dino"),
        prep_job(PrepJob(("images", "/data/a", "/runs/b"), 4, "/runs/b"), SITE, name="prep"),
    ):
        spec = manifest["spec"]
        container = spec.get("trainer") or spec["template"]["spec"]["containers"][0]
        for shell in shells:
            subprocess.run([shell, "-n", "-c", expanded(container["command"][2], {})], check=True, timeout=30)
