"""The text of manifests, and what is said when `kubectl` or the cluster refuses.

No cluster is there: `kubectl` is a script that answers as the real one does for these errors, and notes what it
was given.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from data_prep.errors import UserError, WorkFailed
from launchers import kubectl
from launchers.job import Job, PrepJob
from launchers.kubectl import check, submit, to_yaml
from launchers.kubernetes import job_set, prep_job, recipe_map, train_job, training_runtime
from launchers.site import Kubernetes, Site, Volume

SITE = Site(
    image="registry.example/medpretrain:1",
    environment={"A": "on", "B": "1e3", "C": "12:30", "D": "", "E": " x ", "F": "null", "G": "#", "H": "a: b"},
    kubernetes=Kubernetes(namespace="imaging", runtime="medpretrain", volumes=(Volume(claim="runs", path="/runs"),)),
)
JOB = Job("dino", "dino", ("run.dir=/runs/dino",), Path("/runs/dino"), 512)
RUN = {"nodes": 2, "gpus": 8, "name": "dino"}

STAND_IN = """\
#!{python}
import json, sys, time
words, given = sys.argv[1:], sys.stdin.read()
with open({log!r}, "a") as log:
    log.write(json.dumps([words, given]) + "\\n")
for sign, (code, out, err) in json.loads({answers!r}).items():
    if sign in " ".join(words):
        time.sleep(5 if code == "sleep" else 0)
        print(out, end="")
        print(err, end="", file=sys.stderr)
        sys.exit(code)
"""
NOT_FOUND = 'Error from server (NotFound): {} "{}" not found'


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a `kubectl` that answers words with (exit code, stdout, stderr), and gives what it was called with."""

    def make(**answers: tuple) -> callable:
        log = tmp_path / "log.jsonl"
        script = tmp_path / "kubectl"
        held = json.dumps({sign.replace("_", " "): answer for sign, answer in answers.items()})
        script.write_text(STAND_IN.format(python=sys.executable, log=str(log), answers=held))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return make


def read(text: str) -> list[dict]:
    """As Kubernetes does: YAML 1.1."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return list(yaml.load_all(text))


def test_the_text_is_read_back_as_the_manifests(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine  # a comment\n\nbackbone:\n\tname: x\n  trailing: 'spaces'   \n")
    job, config = recipe_map(Job("mine", str(file), ("note=a\nb\t",), Path("/runs/mine"), 512), SITE, name="mine")
    manifests = [
        config,
        train_job(job, SITE, **RUN | {"name": "mine"}),
        training_runtime(SITE, name="medpretrain"),
        job_set(JOB, SITE, **RUN),
        prep_job(PrepJob(("images", "/data/a", "/runs/b"), 4, "/runs/b"), SITE, name="prep"),
    ]
    assert read(to_yaml(manifests)) == manifests
    assert "&id" not in to_yaml(manifests)


def test_scripts_are_blocks_that_a_person_can_read():
    text = to_yaml(train_job(JOB, SITE, **RUN))
    assert "      - |\n        set -e\n" in text
    assert "\n          -m medpretrain train dino run.dir=/runs/dino\n" in text


def test_the_first_lines_say_how_to_follow_stop_and_go_on():
    manifest = train_job(JOB, SITE, **RUN)
    head = [
        line for line in to_yaml(manifest, "medpretrain launch kubernetes dino\nkind: x").splitlines() if "#" in line
    ]
    assert head[0] == "# Made by: medpretrain launch kubernetes dino kind: x"  # no line gets out of the comment
    said = "\n".join(head)
    for part in ("create -f", "-n imaging get trainjob dino", "logs -f", "jobset-name=dino", "Stop:", "Go on:"):
        assert part in said
    # Else a second run would write where the first still commits its checkpoint.
    assert "delete --cascade=foreground" in said
    wide = to_yaml(prep_job(PrepJob(("images", "/data/a", "/runs/b"), 40, "/runs/b"), SITE, name="prep"))
    assert "--max-log-requests=40 -l batch.kubernetes.io/job-name=prep" in wide


def test_a_manifest_that_begins_where_it_says_is_no_way_to_go_on():
    assert "kubectl create -f FILE (from the last checkpoint)" in to_yaml(train_job(JOB, SITE, **RUN))
    assert "# Go on:   the same command without --resume\n" in to_yaml(train_job(JOB, SITE, **RUN), again=False)


def test_the_cluster_is_asked_before_anything_is_made(stand_in):
    calls = stand_in(create=(0, "trainjob.trainer.kubeflow.org/dino created\n", ""))
    text = to_yaml(train_job(JOB, SITE, **RUN))
    assert submit(text, "imaging") == "trainjob.trainer.kubeflow.org/dino created\n"
    words = [call[0] for call in calls()]
    assert words == [
        ["get", "namespace", "imaging", "-o", "name"],
        ["get", "clustertrainingruntime", "medpretrain", "-o", "name"],
        ["create", "--validate=strict", "--dry-run=server", "-n", "imaging", "-f", "-"],
        ["create", "--validate=strict", "-n", "imaging", "-f", "-"],
    ]
    assert [given for _, given in calls()][2:] == [text, text]


def test_a_check_makes_nothing(stand_in):
    calls = stand_in()
    check(to_yaml(job_set(JOB, SITE, **RUN)), "imaging")
    assert [call[0][:3] for call in calls()] == [
        ["get", "namespace", "imaging"],
        ["create", "--validate=strict", "--dry-run=server"],
    ]


def test_without_kubectl_the_fix_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--dry-run"):
        submit(to_yaml(job_set(JOB, SITE, **RUN)), "imaging")


def test_a_namespace_that_is_not_there_is_named_with_the_nearest(stand_in):
    calls = stand_in(
        get_namespace_imaging=(1, "", NOT_FOUND.format("namespaces", "imaging")),
        get_namespace=(0, "namespace/default\nnamespace/imagings\n", ""),
    )
    with pytest.raises(UserError, match=r"no namespace 'imaging'; did you mean 'imagings'\?"):
        submit(to_yaml(job_set(JOB, SITE, **RUN)), "imaging")
    assert not any("create" in words for words, _ in calls())


def test_a_runtime_that_is_not_there_is_named_with_the_nearest(stand_in):
    calls = stand_in(
        get_clustertrainingruntime_medpretrain=(1, "", NOT_FOUND.format("clustertrainingruntimes", "medpretrain")),
        get_clustertrainingruntime=(0, "c.trainer.kubeflow.org/torch-distributed\nc.t/med-pretrain\n", ""),
    )
    with pytest.raises(UserError, match=r"no clustertrainingruntime 'medpretrain'; did you mean 'med-pretrain'\?"):
        submit(to_yaml(train_job(JOB, SITE, **RUN)), "imaging")
    assert not any("create" in words for words, _ in calls())


def test_a_cluster_without_trainer_is_told_apart(stand_in):
    said = 'error: the server doesn\'t have a resource type "clustertrainingruntime"'
    stand_in(get_clustertrainingruntime=(1, "", said))
    with pytest.raises(UserError, match=r"no Kubeflow Trainer.*a JobSet does without"):
        submit(to_yaml(train_job(JOB, SITE, **RUN)), "imaging")


def test_who_may_not_look_at_namespaces_may_still_start(stand_in):
    said = 'Error from server (Forbidden): namespaces "imaging" is forbidden: User "x" cannot get resource "namespaces"'
    stand_in(get_namespace=(1, "", said), create=(0, "made", ""))
    assert submit(to_yaml(job_set(JOB, SITE, **RUN)), "imaging") == "made"


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ('Error from server (AlreadyExists): trainjobs "dino" already exists', "another name"),
        ('strict decoding error: unknown field "spec.runtimePatches"', "older than 2.3"),
        ('no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"', "has no JobSet"),
        ("The connection to the server localhost:8080 was refused", "refused"),
    ],
)
def test_what_the_cluster_refuses_is_shown_and_nothing_is_made(said, fix, stand_in):
    calls = stand_in(dry_run=(1, "", ""), **{"--dry-run=server": (1, "", said)})
    with pytest.raises(UserError, match=fix) as raised:
        submit(to_yaml(job_set(JOB, SITE, **RUN)), "imaging")
    assert said in str(raised.value)
    assert [words for words, _ in calls() if "create" in words and "--dry-run=server" not in words] == []


def test_a_cluster_that_cannot_be_reached_says_so(stand_in):
    stand_in(get_namespace=(1, "", "Unable to connect to the server: dial tcp: lookup k8s: no such host"))
    with pytest.raises(UserError, match="Unable to connect"):
        submit(to_yaml(job_set(JOB, SITE, **RUN)), "imaging")


def test_a_cluster_that_does_not_answer_is_given_up(stand_in, monkeypatch):
    stand_in(get=("sleep", "", ""))
    monkeypatch.setattr(kubectl, "TIMEOUT_S", 1)
    with pytest.raises(WorkFailed, match="no answer for 1 s"):
        submit(to_yaml(job_set(JOB, SITE, **RUN)), "imaging")


def test_the_stand_in_takes_its_words_like_a_program(stand_in):
    calls = stand_in(hello=(3, "out", "err"))
    got = subprocess.run(["kubectl", "hello", "a b"], input="in", capture_output=True, text=True)
    assert (got.returncode, got.stdout, got.stderr) == (3, "out", "err")
    assert calls() == [[["hello", "a b"], "in"]]
