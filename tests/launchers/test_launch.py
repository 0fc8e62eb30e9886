"""`medpretrain launch`: what is wrong is said at once, before anything runs or is submitted."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ("simclr", "data.path=shards/none", "train.global_batch=64")


VOLUMES = "kubernetes:\n  volumes:\n    - {claim: a, path: /runs/}\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """site(text): the site file that is in force."""
    monkeypatch.setenv("MEDPRETRAIN_SITE", str(tmp_path / "site.yaml"))

    def write(text):
        (tmp_path / "site.yaml").write_text(text)
        return tmp_path / "site.yaml"

    write("gpus: 4\n")
    return write


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(NAME=shell text): stand-ins; nothing else is on PATH but the shell's own."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for tool in ("bash", "sh", "sed", "cat", "true"):
        (folder / tool).symlink_to(f"/bin/{tool}")

    def make(**texts):
        for name, text in texts.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    make()
    return make


def test_a_dry_run_prints_the_gate_and_the_run_and_writes_nothing(medpretrain, tmp_path, monkeypatch, site):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command in (("torchrun",), ("slurm",), ("prep", "slurm", "--parts", "2")):
        words = ("images", "in", "out") if "prep" in command else RECIPE
        code, out, _ = medpretrain("launch", *command, "--dry-run", *words)
        assert code == 0
        assert f"-m medpretrain {'prep' if 'prep' in command else 'train'} {words[0]}" in out
        assert ("-m medpretrain preflight simclr" in out) == ("prep" not in command)
        code, out, _ = medpretrain("launch", *command, "--dry-run", *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("torchrun", "simlcr"), "there is no recipe 'simlcr'; did you mean 'simclr'?"),
        (("torchrun", "simclr"), "the recipe names no dataset"),
        (("torchrun", *RECIPE, "--nodes", "3"), "3 nodes x 4 processes = 12 do not divide train.global_batch=64"),
        (("torchrun", *RECIPE, "--nodes", "two"), "--nodes two: give a number, or a range such as 2:4"),
        (("torchrun", *RECIPE, "--nodes", "2"), "--head HOST, the same on every host"),
        (("torchrun", *RECIPE, "--nodes", "2", "--head", "a:b"), "--head a:b: give HOST or HOST:PORT"),
        (("deepspeed", *RECIPE), "there is no hostfile hostfile"),
        (("deepspeed", *RECIPE, "--no-ssh"), "--no-ssh needs this host's place in the hostfile: --node-rank"),
        (("deepspeed", *RECIPE, "--node-rank", "1"), "--node-rank is for --no-ssh"),
        (("slurm", *RECIPE, "--nodes", "3"), "3 nodes x 4 tasks = 12 do not divide"),
        (("slurm", *RECIPE), "sbatch is missing here"),
        (("prep", "slurm", "--parts", "2", "images", "in", "out", "--part", "1/2"), "--part is given by the array"),
        (("prep", "slurm", "--parts", "2", "images", "in", "out", "--part=1/2"), "--part is given by the array"),
        (
            ("prep", "slurm", "--parts", "2", "images", "in", "out", "--split=train=0.5"),
            "the parts add up to 0.5, not 1",
        ),
        (("prep", "slurm", "--parts", "2", "picture", "in", "out"), "there is no `medpretrain prep picture`"),
        (("prep", "slurm", "--parts", "2", "images", "in", "out", "--spilt", "x"), "No such option: --spilt"),
        (("torchrun", *RECIPE, "--site", "none.yaml"), "there is no site file none.yaml"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_starts(
    medpretrain, monkeypatch, tmp_path, site, programs, words, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = medpretrain("launch", *words)
    assert code == 2
    assert said in " ".join(err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: 8\nslurm:\n  partion: x\n", "site.yaml:3: unknown key 'partion'; did you mean 'partition'?"),
        ("gpus: eight\n", "site.yaml:1: gpus: Input should be a valid integer"),
        ("environment: {A-B: x}\n", "'A-B' is no name of an environment variable"),
        ("environment:\n  MLFLOW_TRACKING_PASSWORD: x\n", "site.yaml:2: "),
        ("- gpus\n", "a site file is a mapping"),
        ("environment:\n  A: b\n  MLFLOW_TRACKING_URI: https://me:hunter2@h\n", "site.yaml:3: environment.MLFLOW_TR"),
        ("setup:\n  - export URI=https://me:hunter2@h\n", "site.yaml:2: setup.0: a URL with a password"),
        (f"{VOLUMES}    - {{claim: b, path: runs}}\n", "site.yaml:4: kubernetes.volumes.1.path: 'runs' is no place"),
        (f"{VOLUMES}    - {{claim: b, path: /a/../runs}}\n", "site.yaml:4: kubernetes.volumes.1.path: "),
        (f"{VOLUMES}    - {{claim: b, path: /runs}}\n", "site.yaml:4: kubernetes.volumes.1.path: two volumes"),
        (
            f"{VOLUMES}    - {{claim: b, path: /dev/shm/}}\n",
            "site.yaml:4: kubernetes.volumes.1.path: /dev/shm is",
        ),
        (f"{VOLUMES}    - {{claim: b, path: /etc/medpretrain/x}}\n", "/etc/medpretrain/x is taken in a pod"),
        (f"{VOLUMES}    - {{claim: b, path: /}}\n", "/ is taken in a pod"),
    ],
)
def test_a_wrong_site_file_is_an_error_with_its_line(medpretrain, site, text, said):
    site(text)
    code, _, err = medpretrain("launch", "torchrun", *RECIPE, "--dry-run")
    assert code == 2
    assert said in err
    assert "hunter2" not in err


def test_a_password_in_the_site_file_is_refused_and_not_shown(medpretrain, site):
    site("environment:\n  WANDB_API_KEY: hunter2\n")
    code, out, err = medpretrain("launch", "slurm", *RECIPE, "--dry-run")
    assert code == 2
    assert "WANDB_API_KEY" in err
    assert "hunter2" not in out + err


DICOM = ("dicom", "/runs/in", "/runs/out", "--key-file", "/runs/key")
POD = "image: registry.example/medpretrain:1\ngpus: 4\n" + VOLUMES
RUNS = [("slurm",), ("torchrun",), ("kubernetes",), ("kubernetes", "--kind", "jobset")]
PREPS = [("prep", "slurm", "--parts", "2"), ("prep", "kubernetes", "--parts", "2")]


@pytest.mark.parametrize("launch", RUNS, ids="-".join)
@pytest.mark.parametrize(
    "word",
    [
        "tracking.uri=https://me:hunter2@h",
        "tracking.uri=https://h/?token=hunter2",
        "checkpoint.to=s3://AK:hunter2@b/c",
        "checkpoint.to=s3://AK:hun/ter2@b/c",
        "data.path=[/runs/a,s3://AK:hunter2@b/c]",
        "run.dir=s3://hunter2@b/c",
        "--resume=s3://AK:hunter2@b/c/step-00000001",
    ],
)
def test_a_password_in_a_url_of_a_run_is_refused_and_not_shown(medpretrain, site, launch, word):
    site(POD)
    code, out, err = medpretrain("launch", *launch, "--dry-run", *RECIPE, "run.dir=/runs/a", word)
    assert code == 2
    assert "a URL with a password in it, which scripts and manifests would show" in err
    assert "***@" in err or "token=***" in err
    assert "er2" not in out + err


@pytest.mark.parametrize("launch", PREPS, ids="-".join)
@pytest.mark.parametrize(
    "words",
    [
        ("images", "/runs/in", "s3://AK:hunter2@b/c", "--private", "/runs/p"),
        ("images", "s3://AK:hunter2@b/c", "/runs/out"),
        ("images", "/runs/in", "/runs/out", "--cluster=tcp://me:hunter2@h:1"),
    ],
)
def test_a_password_in_a_url_of_a_preparation_is_refused_and_not_shown(medpretrain, site, launch, words):
    site(POD)
    code, out, err = medpretrain("launch", *launch, "--dry-run", *words)
    assert code == 2
    assert "***@" in err
    assert "hunter2" not in out + err


def test_a_password_in_a_recipes_file_reaches_no_manifest(medpretrain, site, tmp_path):
    site(POD)
    shipped = (ROOT / "configs" / "simclr.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("tracking: {uri: 'https://me:hunter2@h'}\n" + shipped)
    words = (tmp_path / "mine.yaml", *RECIPE[1:], "run.dir=/runs/a", "--dry-run")
    for word, said in (("device=cpu", "tracking.uri: a URL with"), ("tracking.uri=none", "mine.yaml:1: a URL with")):
        code, out, err = medpretrain("launch", "kubernetes", *words, word)
        assert code == 2
        assert said in err
        assert "hunter2" not in out + err


def test_what_only_looks_like_a_password_is_launched(medpretrain, site):
    site(POD + "setup: [pip install git+https://git@github.com/me/x@v2]\n")
    words = ("run.dir=/runs/me@2", "checkpoint.to=s3://bucket/a:b@2", "tracking.uri=https://h:5000/x@1")
    code, out, _ = medpretrain("launch", "kubernetes", "--dry-run", *RECIPE, *words)
    assert code == 0
    assert "checkpoint.to=s3://bucket/a:b@2" in out


@pytest.mark.parametrize("launch", PREPS, ids="-".join)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("images", "/runs/in", "s3://b/c"), "give --private DIR"),
        (("images", "/runs/in", "/runs/out", "--private", "/runs/p"), "--private is for an OUT that is a URL"),
        (("images", "/runs/in", "file:///runs/out"), "give a local folder as a path"),
        (("images", "/runs/in", "/runs/out", "--overwrite", "--append"), "exclude each other"),
        (("images", "/runs/in", "/runs/out", "--no-labels", "--label-column", "a"), "exclude each other"),
        (("images", "/runs/in", "/runs/out", "--shard-size", "0"), "--shard-size must be at least 1"),
        (("images", "/runs/in", "/runs/out", "--duplicates", "of"), "did you mean 'off'?"),
        (("images", "/runs/in", "/runs/out", "--resize", "0"), "--resize must be at least 1"),
        (("images", "/runs/in", "/runs/out", "--split", "train=0.5"), "the parts add up to 0.5, not 1"),
        (("retina", "/runs/in.npz", "/runs/out"), "takes a folder or a manifest"),
        (("dicom", "/runs/in", "/runs/out"), "give --key-file"),
        (("dicom", "/runs/in", "/runs/out", "--key-file", "/runs/key", "--bits", "9"), "--bits must be 8 or 16"),
    ],
)
def test_what_prep_would_refuse_is_not_submitted(medpretrain, site, monkeypatch, launch, words, said):
    site(POD)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = medpretrain("launch", *launch, "--dry-run", *words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("images", "/raw", "/runs/out"), "SOURCE /raw is on no volume"),
        (("images", "/runs/in", "/runs"), "OUT /runs is where the volume a is mounted"),
        (("images", "/runs/in", "s3://b/c", "--private", "/tmp/p"), "--private /tmp/p is on no volume"),
        (("images", "/runs/in", "/runs/out", "--key-file", "key"), "--key-file key is on no volume"),
        (("images", "/runs/in", "/runs/out", "--labels", "mine.yaml"), "--labels mine.yaml is on no volume"),
        (("radimagenet", "/runs/in", "/runs/out", "--ultrasound", "/u.yml"), "--ultrasound /u.yml is on no"),
        ((*DICOM, "--profile", "/p.yaml"), "--profile /p.yaml is on no volume"),
        ((*DICOM, "--anatomy", "/a.yaml"), "--anatomy /a.yaml is on no volume"),
        ((*DICOM, "--reviewed", "/r.csv"), "--reviewed /r.csv is on no volume"),
        ((*DICOM, "--window", "fixed:/w.yaml"), "--window /w.yaml is on no volume"),
    ],
)
def test_what_no_pod_would_find_or_keep_is_not_submitted(medpretrain, site, words, said):
    site(POD)
    code, out, err = medpretrain("launch", *PREPS[1], "--dry-run", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_names_of_shipped_files_and_files_on_volumes_are_submitted(medpretrain, site):
    site(POD)
    shipped = ("--profile", "strict_demographics", "--window", "fixed", "--reviewed", "/runs/r.csv")
    for words in (
        (*DICOM, *shipped),
        ("retina", "/runs/in", "s3://b/c", "--private", "/runs/p", "--labels", "fundus", "--key-file", "/runs/key"),
    ):
        code, out, _ = medpretrain("launch", *PREPS[1], "--dry-run", *words)
        assert code == 0
        assert f"-m medpretrain prep {words[0]}" in out


SINFO = "echo batch 2; echo urgent 1"


@pytest.mark.parametrize(
    ("words", "sbatch", "said"),
    [
        (("--partition", "bacht"), "true", "there is no partition 'bacht'; did you mean 'batch'?"),
        (("--partition", "urgent", "--nodes", "2"), "true", "partition urgent has 1 nodes, not 2"),
        (("--partition", "batch,urgnt"), "true", "there is no partition 'urgnt'; did you mean 'urgent'?"),
        (("--partition", "urgent,batch", "--nodes", "2"), "echo sbatch: error: No >&2; exit 1", "sbatch: error: No"),
        (("--partition", "batch"), "echo sbatch: error: Invalid account >&2; exit 1", "sbatch: error: Invalid account"),
    ],
)
def test_what_slurm_would_refuse_is_said_and_nothing_is_submitted(
    medpretrain, monkeypatch, tmp_path, site, programs, words, sbatch, said
):
    monkeypatch.chdir(tmp_path)
    programs(sinfo=SINFO, sbatch=f'echo "$@" >> {tmp_path}/submitted; {sbatch}')
    code, _, err = medpretrain("launch", "slurm", *RECIPE, *words)
    assert code == 2
    assert said in err
    submitted = tmp_path / "submitted"
    assert not submitted.exists() or submitted.read_text().startswith("--test-only")


def test_a_host_that_ssh_does_not_reach_is_named(medpretrain, monkeypatch, tmp_path, programs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostfile").write_text("gpu01 slots=4\ngpu02 slots=4\n")
    refuse = 'case "$*" in *gpu02*) echo "ssh: connect to host gpu02: No route to host" >&2; exit 255;; esac'
    programs(ssh=refuse, pdsh="echo rcmd modules: ssh,exec")
    code, _, err = medpretrain("launch", "deepspeed", *RECIPE)
    assert code == 2
    assert "not to be reached by ssh: gpu02 (ssh: connect to host gpu02: No route to host)" in err
    programs(pdsh="echo rcmd modules: ssh")
    code, _, err = medpretrain("launch", "deepspeed", *RECIPE)
    assert code == 2
    assert "pdsh has no module exec: install pdsh-rcmd-exec" in err
    (tmp_path / "programs" / "ssh").unlink()
    code, _, err = medpretrain("launch", "deepspeed", *RECIPE)
    assert code == 2
    assert "ssh is missing: install openssh-client" in err


@pytest.fixture
def deepspeed(medpretrain, monkeypatch, tmp_path, site):
    """deepspeed(word, ...): exit code, output and errors of a dry run on two hosts with four slots."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostfile").write_text("gpu01 slots=4\ngpu02 slots=4\n")
    return lambda *words: medpretrain("launch", "deepspeed", *RECIPE, "--dry-run", *words)


def remote_lines(out):
    """What pdsh would have the hosts' shells do, for the gate and the run."""
    words = shlex.split(out)
    return [words[place + 1] for place, word in enumerate(words) if word == "%h"]


def test_all_hosts_of_a_hostfile_start_at_once(deepspeed, tmp_path):
    (tmp_path / "hostfile").write_text("".join(f"h{number} slots=1\n" for number in range(64)))
    code, out, _ = deepspeed()
    assert code == 0
    assert out.count(" -f 64 -R exec -w h0,h1,") == 2


def test_passwords_are_not_on_a_command_line(deepspeed, monkeypatch, site):
    site("environment: {NCCL_DEBUG: INFO}")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter3@mlflow.example")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "retina")
    code, out, err = deepspeed()
    assert code == 0
    assert "hunter" not in out + err
    assert err.count("MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_URI: not carried to the hosts") == 1
    assert ".mlflow/credentials on gpu01" in err
    assert out.count("export MLFLOW_EXPERIMENT_NAME=retina\n") == out.count("export NCCL_DEBUG=INFO\n") == 2


def test_the_gate_rehearses_on_the_chosen_slots(deepspeed):
    words = ("--include", "gpu02:2,3@gpu01:0,1")
    code, out, _ = deepspeed(*words)
    assert code == 0
    gate, run = remote_lines(out)
    assert "--nodes 2 --gpus 2 --head gpu01:29499 --hosts gpu01,gpu02 --name %h" in gate
    assert "case %h in gpu02) export CUDA_VISIBLE_DEVICES=2,3;; esac\nexec " in gate
    world = re.search(r"--world_info=(\S+)", run)
    assert json.loads(base64.urlsafe_b64decode(world[1])) == {"gpu01": [0, 1], "gpu02": [2, 3]}
    for rank, seen in (("0", False), ("1", True)):
        code, out, _ = deepspeed(*words, "--no-ssh", "--node-rank", rank)
        assert code == 0
        assert ("CUDA_VISIBLE_DEVICES=2,3" in out.partition("launchers.on_host")[0]) == seen


def test_the_gate_refuses_uneven_slots_and_training_takes_them(deepspeed):
    uneven = ("--exclude", "gpu02:0,1", "train.global_batch=48")
    code, _, err = deepspeed(*uneven)
    assert code == 2
    assert "slots are: gpu01 4, gpu02 2" in err
    assert all(option in err for option in ("--include", "--exclude", "--no-preflight"))
    code, out, _ = deepspeed(*uneven, "--no-preflight")
    assert code == 0
    assert len(remote_lines(out)) == 1


def test_without_ssh_training_has_the_setup_and_the_environment_of_the_site(deepspeed, site):
    site('setup: ["module load cuda"]\nenvironment: {NCCL_SOCKET_IFNAME: ib0}\n')
    code, out, _ = deepspeed("--no-ssh", "--node-rank", "1")
    assert code == 0
    gate, run = out.split("OMP_NUM_THREADS=1")[1:]
    for command in (gate, run):
        assert "NCCL_SOCKET_IFNAME=ib0" in command
        assert "module load cuda\nexec" in command
    assert "deepspeed.launcher.launch" in run
    assert "--node_rank=1 --no_local_rank --module medpretrain train simclr" in run


@pytest.mark.parametrize("folder", [".", "/", "runs/.."])
def test_a_run_folder_without_a_name_is_refused(medpretrain, monkeypatch, tmp_path, site, folder):
    monkeypatch.chdir(tmp_path)
    code, _, err = medpretrain("launch", "slurm", *RECIPE, "--dry-run", f"run.dir={folder}")
    assert code == 2
    assert f"run.dir={folder}: give a folder by its name" in err


def test_an_image_that_no_process_would_run_in_is_said(deepspeed, medpretrain, site):
    site("image: /images/train.sqsh\ngpus: 4\n")
    for code, _, err in (deepspeed(), medpretrain("launch", "torchrun", *RECIPE, "--dry-run")):
        assert code == 0
        assert "image: of the site file is not used here" in err


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        (("images", "in", "out"), "slurm"),
        (("images", "--split", "train=0.8,test=0.2", "--workers=3", "in", "out"), "3"),
        (("radimagenet", "in", "--workers", "2", "out"), "2"),
    ],
)
def test_options_of_a_preparation_may_stand_anywhere(medpretrain, monkeypatch, tmp_path, site, words, workers):
    monkeypatch.chdir(tmp_path)
    code, out, _ = medpretrain("launch", "prep", "slurm", "--parts", "2", "--dry-run", *words)
    assert code == 0
    first, last = out.splitlines()[0], out.splitlines()[-1]
    assert first == f"# mkdir -p {tmp_path}/out.launch && sbatch {tmp_path}/out.launch/array.sbatch"
    assert last.count("--workers") == 1
    assert last.endswith('--workers "${SLURM_CPUS_PER_TASK:-1}"') == (workers == "slurm")


def test_a_login_node_without_torch_launches(tmp_path):
    """Nothing that `launch` imports needs torch."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = [sys.executable, "-m", "medpretrain", "launch", "slurm", *RECIPE, "--gpus", "8", "--dry-run"]
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "#SBATCH --ntasks-per-node=8" in answer.stdout
