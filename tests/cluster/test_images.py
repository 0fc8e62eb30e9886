"""The images, built from their Dockerfiles by buildah and run: no engine, no root inside, nothing of them replaced.

The base of both is a Debian that debootstrap makes here. The train image's default base has torch and CUDA installed;
this one sees what this Python has, torch and almost all else, through a mounted folder. So every instruction runs and
pip decides what stays and what comes, without gigabytes of torch. INSTALLED says what pip really installs.

Packages come as this machine's pip gets them; its settings and certificates are mounted while an image is built and are
no part of it.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from ruamel.yaml import YAML

import medpretrain

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
BASE = "localhost/base"
NOBODY = "4242:4242"
"""A user that no image knows, as `--user $(id -u):$(id -g)` gives one."""
INSTALLED = ("deepspeed", "medpretrain", "mlflow", "mlflow-skinny", "mlflow-tracing", "ninja", "setuptools", "timm")
"""What the train image's base lacks here, and pip installs."""
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
CODECS = "import gdcm, jpeg_ls, openjpeg, pyarrow.parquet, scipy.ndimage, simplejpeg"


class Buildah:
    """buildah with a storage of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.command = ["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run")]
        self.environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *words: str | Path, within: float = 60, fails: bool = False) -> str:
        """What it prints to stdout; of a command that is to fail, what it prints to both."""
        done = subprocess.run(
            [*self.command, *map(str, words)], env=self.environment, capture_output=True, text=True, timeout=within
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, said[-6000:]
        return said if fails else done.stdout.strip()

    def build(self, kind: str, volumes: list[str]) -> dict[str, Any]:
        """Build `docker/KIND.Dockerfile`; its configuration, `bytes` that it adds to the base, and a `container`."""
        arguments = [f"--build-arg={word}" for word in (f"BASE={BASE}", "REVISION=0123abc")]
        file = ROOT / "docker" / f"{kind}.Dockerfile"
        self("build", "--network=host", *arguments, *volumes, "--tag", kind, "--file", file, ROOT, within=500)
        inspected = json.loads(self("inspect", "--type=image", kind))
        layers = json.loads(inspected["Manifest"])["layers"]
        # Its name for compose's server; one container, as each is a copy of the whole image.
        container = self("from", "--network=host", "--add-host=mlflow:127.0.0.1", kind)
        added = sum(layer["size"] for layer in layers[1:])
        return inspected["OCIv1"]["config"] | {"bytes": added, "container": container}


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Iterator[Buildah]:
    """A storage with the base, which is removed at the end."""
    folder = tmp_path_factory.mktemp("storage")
    buildah = Buildah(folder)
    try:
        container = buildah("from", "scratch")
        include = "--include=ca-certificates,python3-pip,python3-venv"
        made = ["debootstrap", "--variant=minbase", include, "bookworm", buildah("mount", container)]
        made = ["unshare", "--mount", *made]  # what it mounts there goes with it, whatever ends it
        done = subprocess.run(made, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        buildah("umount", container)
        buildah("commit", "--rm", container, BASE, within=120)
        yield buildah
    finally:
        # Of a container whose process was killed the root stays mounted.
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for place in sorted((place for place in mounted if place.startswith(f"{folder}/")), reverse=True):
            subprocess.run(["umount", place], check=True, timeout=60)
        shutil.rmtree(folder)


def _mount(path: str | Path, inside: str | Path) -> str:
    return f"--volume={path}:{inside}:ro"


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> list[str]:
    """Options that let pip inside find packages as it does here: its settings, folders they name, certificates."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
    )
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # these come first
        key, _, value = line.partition("=")
        settings[re.split(r"[.:]+", key)[-1]] = ast.literal_eval(value)
    folders = {Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()}
    # An index's files lie beside it.
    folders = {
        path.parent if path.name == "simple" else path for path in folders if path.is_absolute() and path.is_dir()
    }
    if "cert" in settings:
        settings["cert"] = CERTIFICATES
    written = configparser.RawConfigParser()
    written["global"] = settings
    file = tmp_path_factory.mktemp("pip") / "pip.conf"
    with file.open("w") as stream:
        file.chmod(0o600)
        written.write(stream)
    return [
        _mount(file, "/etc/pip.conf"),
        _mount(CERTIFICATES, CERTIFICATES),
        *(_mount(path, path) for path in folders),
    ]


@pytest.fixture(scope="module")
def torch_of_the_base(tmp_path_factory) -> list[str]:
    """Options that make the base one with torch: what this Python has, but for INSTALLED, seen through a .pth file."""
    assert sys.version_info[:2] == (3, 11), "Debian bookworm's Python is 3.11, and so must be the one with torch"
    folder = tmp_path_factory.mktemp("torch")
    folder.chmod(0o755)
    site = None
    for found in distributions():
        if found.name is None or canonicalize_name(found.name) in INSTALLED or found.files is None:
            continue
        if canonicalize_name(found.name) == "torch":
            site = found.locate_file("")
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            link = folder / top
            if not link.is_symlink():
                link.symlink_to(f"/opt/host/{top}")
    assert site is not None, "this Python has no torch"
    (folder / "base.pth").write_text("/opt/base\n")
    pth = _mount(folder / "base.pth", "/usr/lib/python3/dist-packages/base.pth")
    return [_mount(folder, "/opt/base"), _mount(site, "/opt/host"), pth]


@pytest.fixture(scope="module")
def prep(buildah, registry) -> dict[str, Any]:
    return buildah.build("prep", registry)


@pytest.fixture(scope="module")
def train(buildah, registry, torch_of_the_base) -> dict[str, Any]:
    return buildah.build("train", registry + torch_of_the_base)


def _locked() -> dict[str, str]:
    """Version by name of what requirements.lock holds for this platform."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"\w", line)]
    wanted = [asked for asked in map(Requirement, lines) if asked.marker is None or asked.marker.evaluate()]
    return {canonicalize_name(asked.name): str(asked.specifier).removeprefix("==") for asked in wanted}


def _packages(buildah: Buildah, container: str, *options: str) -> dict[str, str]:
    """Version by name of what the image's Python finds, and imports: the first on its path."""
    code = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()))"
    said = buildah("run", *options, container, "--", "python", "-c", code)
    found = (word.partition("==") for word in reversed(said.split()))
    return {canonicalize_name(name): version for name, _, version in found}


def _refuse_wrong_words(config: dict[str, Any], title: str) -> None:
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == title
    assert labels["version"] == medpretrain.__version__
    assert labels["revision"] == "0123abc"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"] == BASE
    assert config["Entrypoint"] == ["medpretrain"]  # a list: no shell stands between it and a signal
    user, group = config["User"].split(":")
    assert int(user) > 0 < int(group)  # numbers: Kubernetes cannot tell from a name that it is not root


def test_the_prep_image_is_small_locked_and_without_torch_and_root(buildah, prep):
    _refuse_wrong_words(prep, "medpretrain-prep")
    print(f"prep adds {prep['bytes'] / 1e6:.0f} MB to its base")
    assert prep["bytes"] < 560e6
    container = prep["container"]
    assert buildah("run", container, "--", "id", "-u") == prep["User"].split(":")[0]
    assert "No module named 'torch'" in buildah("run", container, "--", "python", "-c", "import torch", fails=True)
    installed = _packages(buildah, container)
    assert installed.pop("medpretrain") == medpretrain.__version__
    locked = _locked()
    assert installed == {name: locked[name] for name in installed}
    buildah("run", container, "--", "python", "-c", CODECS)


def test_the_prep_image_prepares_what_this_machine_prepares_to_the_byte(buildah, prep, tmp_path):
    tmp_path.chmod(0o755)
    work = tmp_path / "work"
    draw = np.random.default_rng(0)
    for name, form in (("chest", "png"), ("hand", "jpg")):
        (work / "in" / name).mkdir(parents=True)
        for image in range(12):
            pixels = draw.integers(0, 255, (48, 40 + image, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(work / "in" / name / f"p{image}.{form}")
    (work / "in" / "hand" / "broken.jpg").write_bytes((work / "in" / "hand" / "p0.jpg").read_bytes()[:300])
    work.chmod(0o777)
    options = ["--split", "train=0.5,test=0.5", "--shard-size", "5", "--workers", "2", "--resize", "32"]
    container = prep["container"]
    inside = [*prep["Entrypoint"], "prep"]
    run = ["run", "--user", NOBODY, f"--volume={work}:/work", container, "--", *inside]
    buildah(*run, "images", "/work/in", "/work/out", *options, within=120)
    buildah(*run, "verify", "/work/out", within=120)
    here = [sys.executable, "-m", "medpretrain", "prep", "images", work / "in", tmp_path / "here", *options]
    subprocess.run(here, check=True, timeout=120, cwd=ROOT, capture_output=True)

    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(work / "out") == content(tmp_path / "here")
    assert json.loads((work / "out" / "dataset.json").read_text())["samples"] == 24
    assert {path.stat().st_uid for path in work.joinpath("out").rglob("*")} == {4242}


def test_the_train_image_keeps_its_base_s_torch_and_locks_the_rest(buildah, train, torch_of_the_base):
    _refuse_wrong_words(train, "medpretrain-train")
    container = train["container"]
    installed = _packages(buildah, container, *torch_of_the_base)
    locked = _locked() | {"medpretrain": medpretrain.__version__}
    assert {name: installed[name] for name in INSTALLED} == {name: locked[name] for name in INSTALLED}
    code = "import torch, torchvision, deepspeed; print(torch.__file__, torchvision.__file__, deepspeed.__file__)"
    run = ["run", "--user", NOBODY, *torch_of_the_base, container, "--"]
    *kept, ours = buildah(*run, "python", "-c", code, within=120).splitlines()[-1].split()
    assert all(path.startswith("/opt/base/") for path in kept)
    assert ours.startswith("/usr/local/")
    headers = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')"
    compiled = (
        f"echo '#include <Python.h>' > $HOME/it.cpp && g++ -fsyntax-only -I{headers} $HOME/it.cpp && ninja --version"
    )
    buildah(*run, "sh", "-c", compiled)


def test_what_a_base_has_for_its_gpu_is_not_replaced_by_the_lock():
    """Unlike the base here, a real one has other versions than the lock."""
    lock = (ROOT / "requirements.lock").read_text()
    assert {"torch", "torchvision", "triton", "nvidia-cublas", "numpy"} <= _locked().keys()
    base = {
        "torch": "2.11.0+cu130",
        "torchvision": "0.26.0",
        "triton": "3.6.0",
        "nvidia_cublas": "13.0.0",
        "numpy": "2.0",
    }
    constraints = runpy.run_path(str(ROOT / "docker" / "constraints.py"))["constraints"]

    def versions(installed: dict[str, str]) -> dict[str, str]:
        asked = [Requirement(line) for line in constraints(lock, installed)]
        applied = [one for one in asked if one.marker is None or one.marker.evaluate()]
        assert len({one.name for one in applied}) == len(applied)
        return {one.name: str(one.specifier).removeprefix("==") for one in applied}

    assert versions({"numpy": "2.0"}) == _locked()
    kept = {"torch": "2.11.0+cu130", "torchvision": "0.26.0", "triton": "3.6.0", "nvidia-cublas": "13.0.0"}
    assert versions(base) == _locked() | kept


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """What Compose itself reads from compose.yaml."""
    read = ["docker-compose", "--file", str(ROOT / "docker" / "compose.yaml"), "config"]
    done = subprocess.run(read, capture_output=True, text=True, timeout=60, check=True)
    return YAML(typ="safe").load(done.stdout)["services"]


def test_compose_shows_its_server_to_no_other_machine(services):
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000/tcp"]
    assert services["demo"]["depends_on"] == {"mlflow": {"condition": "service_healthy"}}
    for service in services.values():
        assert Path(service["build"]["context"]) == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


@pytest.fixture
def network() -> Iterator[list[str]]:
    """What puts a command into a network of its own: a loopback interface and nothing else."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 600"], stdout=-1
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
    finally:
        holder.kill()
        holder.wait()


def test_what_compose_starts_trains_the_demo_and_tracks_it(
    buildah, train, services, torch_of_the_base, network, tmp_path
):
    server, demo = services["mlflow"], services["demo"]
    container = train["container"]
    for name in services:
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)

    def command(name: str, words: list[str], *before: str) -> list[str]:
        environment = {"OMP_NUM_THREADS": "1"} | services[name].get("environment", {})
        options = [f"--env={key}={value}" for key, value in environment.items()]
        volumes = [*torch_of_the_base, f"--volume={tmp_path / name}:/work"]
        inside = ["run", "--user", NOBODY, *options, *volumes, container, "--"]
        return [*network, *before, *buildah.command, *inside, *words]

    # In a PID namespace, so that none of the server's processes is left when the first is killed.
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (tmp_path / "log").open("w+") as log:
        started = subprocess.Popen(
            command("mlflow", server["entrypoint"], *alone), env=buildah.environment, stdout=log, stderr=log
        )
        try:
            healthy = command("mlflow", server["healthcheck"]["test"][1:])
            until = time.monotonic() + 120
            while subprocess.run(healthy, env=buildah.environment, capture_output=True, timeout=60).returncode:
                assert started.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(1)
            small = [*train["Entrypoint"], *demo["command"], "--per-class", "14", "--steps", "2"]
            done = subprocess.run(
                command("demo", small), env=buildah.environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, (
                done.stdout[-3000:] + done.stderr[-3000:] + (tmp_path / "log").read_text()[-3000:]
            )
            asked = """
import json, urllib.request
def ask(what, **words):
    request = urllib.request.Request(f"http://127.0.0.1:5000/api/2.0/mlflow/{what}", json.dumps(words).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request, timeout=30))
found = ask("experiments/search", max_results=10)["experiments"]
runs = ask("runs/search", experiment_ids=[one["experiment_id"] for one in found])["runs"]
print(json.dumps([(one["info"]["status"], sorted(m["key"] for m in one["data"]["metrics"])) for one in runs]))
"""
            said = subprocess.run([*network, sys.executable, "-c", asked], capture_output=True, timeout=60, check=True)
        finally:
            started.kill()
            started.wait()
    runs = json.loads(said.stdout)
    assert [status for status, _ in runs] == ["FINISHED", "FINISHED"]
    assert all("loss" in metrics for _, metrics in runs), runs
    assert {path.name for path in (tmp_path / "demo" / "demo" / "exports").iterdir()} == {
        "demo_dino",
        "demo_modan_mulsupcon",
    }
    provenance = [json.loads(path.read_text()) for path in (tmp_path / "demo" / "demo").rglob("provenance.json")]
    assert [start["git"]["commit"] for one in provenance for start in one["starts"]] == ["0123abc", "0123abc"]


def test_no_more_of_a_checkout_enters_an_image_than_the_package(tmp_path, buildah):
    """A run, shards or a key that lie in the checkout would be sent to whoever gets the image."""
    context = tmp_path / "context"
    context.mkdir()
    shutil.copy(ROOT / ".dockerignore", context)
    for name in (
        "runs/a.pt",
        "shards/x.tar",
        "pseudonyms.key",
        "docker/key",
        "medpretrain/a.py",
        "medpretrain/__pycache__/a",
    ):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).touch()
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    buildah("build", "--tag", "context", "--file", tmp_path / "Dockerfile", context)
    folder = Path(buildah("mount", buildah("from", "context")))
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == ["medpretrain/a.py"]
