"""Manifests, held against the published schemas, and what of them a user counts on."""

from __future__ import annotations

import copy
import gzip
import json
import re
from functools import cache
from pathlib import Path

import jsonschema
import pytest

from data_prep.errors import UserError
from launchers.job import Job, PrepJob
from launchers.kubernetes import job_set, prep_job, recipe_map, resource_name, train_job, training_runtime
from launchers.site import Kubernetes, Site, Volume

SCHEMAS = Path(__file__).parent / "schemas"
NEWEST, OLDEST = "2.3.0", "2.0.0"

VOLUMES = (Volume(claim="data", path="/data", read_only=True), Volume(claim="runs", path="/runs"))
BARE = Site(image="registry.example/medpretrain:1", kubernetes=Kubernetes(volumes=VOLUMES))
FULL = Site(
    image="registry.example/medpretrain:1",
    cpus=32,
    environment={"NCCL_DEBUG": "INFO", "ANSWER": "on"},
    setup=("ulimit -n 65536",),
    kubernetes=Kubernetes(
        namespace="imaging",
        queue="gpus",
        volumes=(*VOLUMES, Volume(claim="runs", path="/cache")),
        grace_s=900,
        shared_memory="64Gi",
        node_selector={"gpu": "h100"},
        pull_secret="registry",
    ),
)
JOB = Job("dino", "dino", ("optim.lr=3e-4", "run.dir=/runs/dino"), Path("/runs/dino"), 512)
PREP = PrepJob(("dicom", "/data/dicom", "/runs/shards", "--workers", "8"), 4, "/runs/shards")
RUN = {"nodes": 2, "gpus": 8, "name": "dino"}


@cache
def definitions(version: str) -> dict:
    """Of kubeflow-trainer-api, made strict: as an API server with strict validation, no field that is unknown."""
    held = json.loads(gzip.decompress((SCHEMAS / f"trainer-{version}.json.gz").read_bytes()))["$defs"]
    for schema in held.values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return held


def refuse_unlike_schema(manifest: dict, version: str = NEWEST) -> None:
    kind = {
        "TrainJob": "TrainerV1alpha1TrainJob",
        "ClusterTrainingRuntime": "TrainerV1alpha1ClusterTrainingRuntime",
        "JobSet": "JobsetV1alpha2JobSet",
        "ConfigMap": "IoK8sApiCoreV1ConfigMap",
        "Job": "Job",
    }[manifest["kind"]]
    # Of a Job the schemas have the spec, which a JobSet holds too, and metadata.
    job = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "batch/v1"},
            "kind": {"const": "Job"},
            "metadata": {"$ref": "#/$defs/IoK8sApimachineryPkgApisMetaV1ObjectMeta"},
            "spec": {"$ref": "#/$defs/IoK8sApiBatchV1JobSpec"},
        },
    }
    schema = {"$ref": f"#/$defs/{kind}", "$defs": {**definitions(version), "Job": job}}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def pod_of(manifest: dict) -> dict:
    """The spec of its pods; of a TrainJob that of the patch."""
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        spec = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    if manifest["kind"] == "ClusterTrainingRuntime":
        spec = spec["template"]["spec"]
    if "replicatedJobs" in spec:
        (node,) = spec["replicatedJobs"]
        assert node["name"] == "node"  # what Kubeflow Trainer looks for
        spec = node["template"]["spec"]
    return spec["template"]["spec"]


def manifests(site: Site) -> list[dict]:
    return [
        train_job(JOB, site, **RUN, secret="tracking"),
        training_runtime(site, name="medpretrain", secret="tracking"),
        job_set(JOB, site, **RUN, secret="tracking"),
        prep_job(PREP, site, name="prep-dicom", secret="tracking"),
    ]


RUNS = pytest.mark.parametrize("number", range(3), ids=["TrainJob", "ClusterTrainingRuntime", "JobSet"])
ALL = pytest.mark.parametrize("number", range(4), ids=["TrainJob", "ClusterTrainingRuntime", "JobSet", "Job"])


@ALL
@pytest.mark.parametrize("site", [BARE, FULL], ids=["bare", "full"])
def test_every_manifest_is_what_the_published_schemas_say(number, site):
    refuse_unlike_schema(manifests(site)[number])


def test_without_patches_every_release_of_trainer_takes_the_pair():
    for version in (OLDEST, NEWEST):
        refuse_unlike_schema(train_job(JOB, FULL, **RUN, patch=False), version)
        refuse_unlike_schema(training_runtime(FULL, name="medpretrain"), version)
        refuse_unlike_schema(job_set(JOB, FULL, **RUN), version)
    with pytest.raises(jsonschema.ValidationError, match="runtimePatches"):
        refuse_unlike_schema(train_job(JOB, FULL, **RUN), OLDEST)


def objects(node: object, at: tuple = ()) -> list[tuple]:
    """The places of all mappings in a manifest but those whose keys a user chooses."""
    if at and at[-1] in {"labels", "limits", "requests", "nodeSelector", "data", "torch"}:
        return []
    if isinstance(node, dict):
        return [at, *(place for key, item in node.items() for place in objects(item, (*at, key)))]
    if isinstance(node, list):
        return [place for key, item in enumerate(node) for place in objects(item, (*at, key))]
    return []


@ALL
def test_a_misspelt_field_anywhere_fails_the_schema(number):
    manifest = manifests(FULL)[number]
    places = objects(manifest)
    assert len(places) > 15
    for place in places:
        wrong = copy.deepcopy(manifest)
        node = wrong
        for key in place:
            node = node[key]
        node["misspelt"] = "x"
        with pytest.raises(jsonschema.ValidationError):
            refuse_unlike_schema(wrong)


@RUNS
def test_a_pod_has_time_for_a_checkpoint_and_room_for_batches(number):
    manifest = manifests(FULL)[number]
    pod = pod_of(manifest)
    assert pod["terminationGracePeriodSeconds"] == 900
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    held = {volume["name"]: volume for volume in pod["volumes"]}
    assert held[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}


@pytest.mark.parametrize("grace", [10, 20, 60, 600, 7200])
def test_torchrun_ends_before_the_kubelet_kills_it(grace):
    site = BARE.model_copy(update={"kubernetes": BARE.kubernetes.model_copy(update={"grace_s": grace})})
    for manifest in (train_job(JOB, site, **RUN), job_set(JOB, site, **RUN)):
        pod = pod_of(manifest)
        env = (manifest["spec"].get("trainer") or pod["containers"][0])["env"]
        timeout = int({entry["name"]: entry.get("value") for entry in env}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert grace // 2 < timeout < pod["terminationGracePeriodSeconds"] == grace


@ALL
def test_volumes_are_mounted_where_the_site_says(number):
    pod = pod_of(manifests(FULL)[number])
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert sorted(claims.values()) == ["data", "runs"]  # a claim twice in a pod is refused
    seen = [
        (mount["mountPath"], claims[mount["name"]], mount.get("readOnly", False))
        for mount in pod["containers"][0]["volumeMounts"]
        if mount["name"] in claims
    ]
    assert seen == [("/data", "data", True), ("/runs", "runs", False), ("/cache", "runs", False)]


@ALL
def test_no_process_is_root_and_none_can_become_it(number):
    pod = pod_of(manifests(BARE)[number])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@ALL
def test_site_defaults_reach_the_pods(number):
    manifest = manifests(FULL)[number]
    pod = pod_of(manifest)
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    if manifest["kind"] != "ClusterTrainingRuntime":
        assert manifest["metadata"]["namespace"] == "imaging"
        assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        text = json.dumps(manifest)
        assert '{"name": "NCCL_DEBUG", "value": "INFO"}' in text
        assert "ulimit -n 65536" in text


def test_gpus_are_asked_for_and_limited_alike():
    """With limits alone Kubeflow Trainer may start one process a node."""
    both = {"requests": {"cpu": "32", "nvidia.com/gpu": "8"}, "limits": {"nvidia.com/gpu": "8"}}
    assert train_job(JOB, FULL, **RUN)["spec"]["trainer"]["resourcesPerNode"] == both
    assert pod_of(job_set(JOB, FULL, **RUN))["containers"][0]["resources"] == both


def test_a_lost_pod_begins_all_anew_and_a_user_error_ends_all():
    for manifest in (training_runtime(FULL, name="medpretrain"), job_set(JOB, FULL, **RUN)):
        spec = manifest["spec"].get("template", manifest)["spec"]
        assert spec["failurePolicy"]["maxRestarts"] == 10
        (rule,) = spec["failurePolicy"]["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
        job = spec["replicatedJobs"][0]["template"]["spec"]
        assert job["backoffLimit"] == 0
        (on,) = job["podFailurePolicy"]["rules"]
        assert on == {
            "action": "FailJob",
            "onExitCodes": {"containerName": "node", "operator": "In", "values": [2]},
        }
        assert pod_of(manifest)["restartPolicy"] == "Never"  # a podFailurePolicy is refused otherwise


def test_a_trainer_is_found_in_the_runtime():
    """Kubeflow Trainer puts what a TrainJob says into the job with this label; without `torch` it sets no PET_*."""
    runtime = training_runtime(FULL, name="medpretrain")
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert pod_of(runtime)["containers"][0]["name"] == "node"
    assert runtime["spec"]["mlPolicy"]["torch"] == {}
    for container in (pod_of(runtime)["containers"][0], pod_of(train_job(JOB, FULL, **RUN))["containers"][0]):
        assert "env" not in container  # the webhook refuses those of a patch


def test_secrets_are_named_and_never_shown():
    job = train_job(JOB, FULL, **RUN, secret="tracking")
    env = {entry["name"]: entry for entry in job["spec"]["trainer"]["env"]}
    assert env["MLFLOW_TRACKING_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "tracking"
    assert pod_of(job_set(JOB, FULL, **RUN, secret="tracking"))["containers"][0]["envFrom"] == [
        {"secretRef": {"name": "tracking"}}
    ]
    with pytest.raises(UserError, match="never what is in it") as raised:
        job_set(JOB, FULL, **RUN, secret="MLFLOW_TRACKING_TOKEN=hunter2")
    assert "hunter2" not in str(raised.value)


def test_a_preparation_tries_a_part_again_but_not_what_a_user_must_mend():
    spec = prep_job(PREP, FULL, name="prep", parallelism=2)["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 2)
    assert spec["backoffLimitPerIndex"] == 3
    user, disrupted = spec["podFailurePolicy"]["rules"]
    assert (user["action"], user["onExitCodes"]["values"]) == ("FailJob", [2])
    assert disrupted["action"] == "Ignore"
    assert prep_job(PREP, FULL, name="prep", parallelism=9)["spec"]["parallelism"] == 4


def test_a_recipe_that_is_a_file_here_travels_along(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nbackbone: {name: vit_small}\n")
    job, config = recipe_map(Job("mine", str(file), (), Path("/runs/mine"), 512), FULL, name="mine")
    refuse_unlike_schema(config)
    assert config["data"] == {"recipe.yaml": file.read_text()}
    for manifest in (train_job(job, FULL, **RUN | {"name": "mine"}), job_set(job, FULL, **RUN | {"name": "mine"})):
        refuse_unlike_schema(manifest)
        pod = pod_of(manifest)
        (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "recipe")
        at = f"{mount['mountPath']}/recipe.yaml"
        assert f"medpretrain train {at}" in json.dumps(manifest)
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "recipe")
        assert volume["configMap"]["name"] == config["metadata"]["name"]
    with pytest.raises(UserError, match="put the file on one of"):
        train_job(job, FULL, **RUN, patch=False)


@pytest.mark.parametrize(
    "line", ["tracking: {uri: 'https://me:hunter2@h'}", "# once s3://AK:hun/ter2@b/c", "a: https://h/?api_key=hunter2"]
)
def test_a_recipe_with_a_password_does_not_travel(line, tmp_path):
    """A ConfigMap is no secret, and an override changes nothing of the file that is in it."""
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{line}\n")
    job = Job("mine", str(tmp_path / "mine.yaml"), ("tracking.uri=none",), Path("/runs/mine"), 512)
    with pytest.raises(UserError, match=r"mine\.yaml:2: a URL with a password") as raised:
        recipe_map(job, FULL, name="mine")
    assert "er2" not in str(raised.value)


def test_recipes_that_pods_have_do_not_travel():
    assert recipe_map(JOB, FULL, name="dino") == (JOB, None)
    there = Job("mine", "/data/recipes/mine.yaml", (), Path("/runs/mine"), 512)
    assert recipe_map(there, FULL, name="mine") == (there, None)
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        recipe_map(Job("mine", "nowhere.yaml", (), Path("/runs/mine"), 512), FULL, name="mine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "pods need a container image"),
        ({"image": "/images/train.sqsh"}, "is a file"),
        ({"image": ""}, "pods need a container image"),
        ({"image": "registry.example/med pretrain:1"}, "none that Kubernetes takes"),
        ({"image": "registry.example/MedPretrain:1"}, "the name in small letters"),
        ({"image": "MedPretrain"}, "the name in small letters"),
        ({"image": "registry.example/medpretrain:"}, "none that Kubernetes takes"),
        ({"image": "docker://registry.example/medpretrain"}, "none that Kubernetes takes"),
        ({"image": "registry.example/medpretrain@sha256:abc"}, "none that Kubernetes takes"),
        ({"environment": {"PET_NNODES": "3"}}, "PET_NNODES is set by the launch"),
        ({"kubernetes": Kubernetes(volumes=VOLUMES, grace_s=1)}, "leaves no time"),
        ({"kubernetes": Kubernetes(volumes=VOLUMES, shared_memory="32GB")}, "shared_memory='32GB'"),
    ],
)
def test_what_a_cluster_would_refuse_later_is_refused_now(change, said):
    site = BARE.model_copy(update=change)
    for make in (train_job, job_set):
        with pytest.raises(UserError, match=re.escape(said)):
            make(JOB, site, **RUN)


@pytest.mark.parametrize(
    "image",
    [
        "medpretrain",
        "imaging/medpretrain:1.0",
        "localhost/medpretrain",
        "registry:5000/a/b-c__d.e:V1_x-2",
        "Registry.Example/medpretrain:1@sha256:" + "a1" * 32,
        "ghcr.io/imaging/medpretrain@sha256:" + "0" * 64,
    ],
)
def test_an_image_that_a_registry_has_is_taken(image):
    assert train_job(JOB, BARE.model_copy(update={"image": image}), **RUN)["spec"]["trainer"]["image"] == image


LOST = pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("runs/dino", "on no volume"),
        ("/tmp/dino", "/data, /runs"),
        ("/runs/../tmp/dino", "on no volume"),
        ("/runs2/dino", "on no volume"),
        ("/data/dino", "read_only"),
        ("//runs/../data/dino", "read_only"),
    ],
)


@LOST
@pytest.mark.parametrize("patch", [True, False])
def test_a_run_that_would_be_gone_with_its_pod_is_refused(folder, said, patch):
    lost = Job("dino", "dino", (), Path(folder), 512)
    behind = Job("dino", "dino", (), Path("/runs/dino"), 512, checkpoint_to=folder)
    for job, what in ((lost, "the run's folder"), (behind, r"checkpoint\.to")):
        with pytest.raises(UserError, match=f"{what} .*{said}"):
            train_job(job, BARE, **RUN, patch=patch)
        with pytest.raises(UserError, match=f"{what} .*{said}"):
            job_set(job, BARE, **RUN)


@pytest.mark.parametrize("patch", [True, False])
def test_a_site_without_volumes_keeps_no_run(patch):
    site = Site(image="registry.example/medpretrain:1")
    for folder in ("runs/dino", "/runs/dino"):
        with pytest.raises(UserError, match="has: none"):
            train_job(Job("dino", "dino", (), Path(folder), 512), site, **RUN, patch=patch)


def test_checkpoints_in_an_object_store_need_no_volume_and_the_run_does():
    train_job(Job("dino", "dino", (), Path("/runs/dino"), 512, checkpoint_to="s3://bucket/dino"), BARE, **RUN)
    with pytest.raises(UserError, match="the run's folder"):
        train_job(Job("dino", "dino", (), Path("/tmp/dino"), 512, checkpoint_to="s3://bucket/dino"), BARE, **RUN)


def preparation(out="/runs/shards", private=None, **reads):
    words = ("dicom", "/data/dicom", out)
    return PrepJob(words, 4, out, private=private, reads=tuple((f"--{name}", path) for name, path in reads.items()))


@LOST
def test_a_preparation_that_would_be_gone_with_its_pods_is_refused(folder, said):
    with pytest.raises(UserError, match=f"OUT .*{said}"):
        prep_job(preparation(folder), BARE, name="prep")
    with pytest.raises(UserError, match=f"--private .*{said}"):
        prep_job(preparation("s3://bucket/shards", folder), BARE, name="prep")
    prep_job(preparation("s3://bucket/shards", "/runs/private"), BARE, name="prep")


@pytest.mark.parametrize("folder", ["/runs", "/runs/", "/runs/a/.."])
def test_a_volume_itself_is_no_dataset(folder):
    """What is beside it is in no volume, and a mount point cannot be renamed."""
    with pytest.raises(UserError, match="give a folder inside it, as in /runs/dataset"):
        prep_job(preparation(folder), BARE, name="prep")
    with pytest.raises(UserError, match=r"--private .* give a folder inside it"):
        prep_job(preparation("s3://bucket/shards", folder), BARE, name="prep")


def test_files_that_no_pod_has_are_refused():
    prep_job(preparation(key="/data/keys/key", labels="/runs/labels.yaml"), BARE, name="prep")
    for path in ("key", "/home/me/key", "/data/../key"):
        with pytest.raises(UserError, match=f"--key {path} is on no volume, and pods would not find it.* /data, /runs"):
            prep_job(preparation(labels="/data/labels.yaml", key=path), BARE, name="prep")


def test_processes_that_do_not_divide_the_batch_are_refused():
    for make in (train_job, job_set):
        with pytest.raises(UserError, match=r"train\.global_batch=512"):
            make(JOB, BARE, nodes=3, gpus=8, name="dino")


@pytest.mark.parametrize("name", ["Dino", "dino_small", "-dino", "3dino", "dino-", "", "d" * 60])
def test_names_that_kubernetes_refuses_are_refused_first(name):
    for make in (train_job, job_set):
        with pytest.raises(UserError, match="name"):
            make(JOB, BARE, **RUN | {"name": name})


@pytest.mark.parametrize("text", ["modan_mulsupcon", "3D run!", "a.b", "__", "Ünit", "prep-dicom"])
def test_a_derived_name_is_accepted(text):
    job_set(JOB, BARE, **RUN | {"name": resource_name(text)})


def test_pods_of_the_longest_name_have_a_host_name():
    name = "d" * 49
    manifest = job_set(Job("d", "dino", (), Path("/runs/d"), 1024), BARE, nodes=128, gpus=8, name=name[:46])
    assert len(f"{manifest['metadata']['name']}-node-0-127-abcde") <= 63
    with pytest.raises(UserError, match="at most"):
        job_set(Job("d", "dino", (), Path("/runs/d"), 1024), BARE, nodes=128, gpus=8, name=name)
