"""The Kubernetes manifests against KubeRay's fields, and against what a run needs of them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.runs import REPO_ROOT
from tests.unit.cluster.pins import pin_of

FOLDER = REPO_ROOT / "cluster" / "kuberay"
KINDS = {"RayJob": FOLDER / "ray_job.yaml", "RayCluster": FOLDER / "ray_cluster.yaml"}
SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())


def read(kind: str) -> dict[str, Any]:
    return yaml.safe_load(KINDS[kind].read_text())


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec


def pods_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.fixture(params=KINDS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return cluster_of(read(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_one_of_kuberays(kind: str):
    jsonschema.validate(read(kind), SCHEMA)
    assert read(kind)["kind"] == kind


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "misspelt field": lambda m: m["spec"].update(backofLimit=2),
    "misspelt mode": lambda m: m["spec"].update(submissionMode="K8SJobMode"),
    "number of CPUs not in quotes": lambda m: m["spec"]["rayClusterSpec"]["headGroupSpec"][
        "rayStartParams"
    ].update({"num-cpus": 0}),
    "volume without a name": lambda m: pods_of(m["spec"]["rayClusterSpec"])[0]["volumes"][0].pop(
        "name"
    ),
    "two ways to delete": lambda m: m["spec"].update(deletionStrategy={}),
    "no cluster": lambda m: m["spec"].pop("rayClusterSpec"),
    "hook of an unknown kind": lambda m: pods_of(m["spec"]["rayClusterSpec"])[0]["containers"][0][
        "lifecycle"
    ].update(beforeStop={}),
    "hook without a command": lambda m: pods_of(m["spec"]["rayClusterSpec"])[0]["containers"][0][
        "lifecycle"
    ].update(preStop={"exec": {"command": "leave_node.sh"}}),
    "no deadline at all": lambda m: m["spec"].update(activeDeadlineSeconds=0),
}


@pytest.mark.parametrize("how", SPOILT)
def test_the_schema_refuses(how: str):
    manifest = copy.deepcopy(read("RayJob"))
    SPOILT[how](manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_the_head_takes_no_work_and_is_reachable(cluster: dict[str, Any]):
    params = cluster["headGroupSpec"]["rayStartParams"]
    assert params == {"num-cpus": "0", "dashboard-host": "0.0.0.0"}
    ports = {p["containerPort"] for p in pods_of(cluster)[0]["containers"][0]["ports"]}
    assert ports == {6379, 8265, 10001}


def test_all_pods_share_image_and_storage(cluster: dict[str, Any]):
    containers = [pod["containers"][0] for pod in pods_of(cluster)]
    images = {container["image"] for container in containers}
    assert len(images) == 1
    assert images.pop().endswith(f"-ray{pin_of('ray')}")
    assert cluster["rayVersion"] == pin_of("ray")
    for pod, container in zip(pods_of(cluster), containers, strict=True):
        claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        at = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert at["/shared"] in claims


def test_the_claim_is_the_one_of_the_prerequisites(cluster: dict[str, Any]):
    claim = yaml.safe_load((FOLDER / "prerequisites.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods_of(cluster)
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == {claim["metadata"]["name"]}


def test_workers_have_gpus_shared_memory_and_room_to_grow(cluster: dict[str, Any]):
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) > 0
        assert any(t["key"] == "nvidia.com/gpu" for t in pod["tolerations"])
        in_memory = {
            v["name"] for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"
        }
        at = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert at["/dev/shm"] in in_memory
        assert {e["name"] for e in container["env"]} >= {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token", "secretName": "statewide-token"}


def test_every_pod_says_that_it_leaves_and_has_the_time_to(cluster: dict[str, Any]):
    dockerfile = (REPO_ROOT / "cluster" / "docker" / "Dockerfile").read_text()
    for pod in pods_of(cluster):
        script, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert f"COPY cluster/leave_node.sh {script}\n" in dockerfile
        # Kubernetes kills when this is over, hook or not; Ray needs some of it to stop.
        assert 60 <= int(seconds) <= pod["terminationGracePeriodSeconds"] - 15


def test_the_job_resumes_in_a_new_cluster_and_fits_into_it():
    spec = read("RayJob")["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    words = dict(word.split("=") for word in spec["entrypoint"].split() if "=" in word)
    assert Path(words["output_dir"]).is_relative_to("/shared")
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    workers, cpus = int(words["cluster.num_workers"]), int(words["cluster.cpus_per_worker"])
    per_pod = min(int(limits["nvidia.com/gpu"]), int(limits["cpu"]) // cpus)
    assert 0 < workers <= per_pod * group["maxReplicas"]


def test_both_manifests_describe_the_same_cluster():
    assert cluster_of(read("RayJob")) == cluster_of(read("RayCluster"))
