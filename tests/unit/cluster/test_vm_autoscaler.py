"""The autoscaler files against the schema that ships with Ray, and what a run needs of them."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from launcher.preflight import NodeType, read_autoscaling_config
from launcher.ray_nodes import find_autoscaling_config
from tests.support.runs import REPO_ROOT
from tests.unit.cluster.pins import pin_of

FILES = sorted((REPO_ROOT / "cluster" / "vm").glob("*.yaml"))
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
CLOUDS = ("aws", "gcp")
NAME = "ray_bootstrap_config.yaml"


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_there_is_one_for_each_place():
    assert [path.stem for path in FILES] == ["aws", "gcp", "on_premise"]


def test_ray_accepts_it(config: dict[str, Any]):
    jsonschema.validate(config, SCHEMA)
    assert isinstance(config["provider"]["type"], str)


@pytest.mark.parametrize(
    "change",
    [
        {"idle_timeout": 5},
        {"max_workers": "4"},
        {"docker": {"image": "x", "gpu": True}},
        {"available_node_types": {"gpu": {"node_config": {}}}},
    ],
    ids=str,
)
def test_ray_refuses_what_is_wrong(config: dict[str, Any], change: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | change, SCHEMA)


def test_nodes_ask_for_a_token_and_the_head_takes_no_work(config: dict[str, Any]):
    head = " ".join(config["head_start_ray_commands"])
    for part in ("--head", "--num-cpus=0", "--dashboard-host=0.0.0.0", "--autoscaling-config="):
        assert part in head
    for start in (head, " ".join(config["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in start
        assert start.count("ray start") == 1
    assert "$RAY_HEAD_IP:6379" in " ".join(config["worker_start_ray_commands"])
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_containers_share_the_storage_and_the_image_of_this_ray(config: dict[str, Any]):
    docker = config["docker"]
    assert docker["image"].endswith(f"-ray{pin_of('ray')}")
    assert "--volume=/shared:/shared" in docker["run_options"]
    assert "--network=host" in docker["run_options"]


def as_ray_up_leaves_it(config: dict[str, Any], home: Path) -> None:
    """Fill out what the file leaves open, as ``ray up`` does before it copies it to the head."""
    filled = prepare_config(config)
    validate_config(filled)
    (home / NAME).write_text(yaml.safe_dump(filled))


def test_ray_fills_it_out(config: dict[str, Any], tmp_path: Path):
    as_ray_up_leaves_it(config, tmp_path)
    filled = yaml.safe_load((tmp_path / NAME).read_text())
    assert filled["max_workers"] == config["max_workers"]
    assert filled["head_node_type"] in filled["available_node_types"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_preflight_reads_the_worker_types(cloud: str, tmp_path: Path):
    config = yaml.safe_load((REPO_ROOT / "cluster" / "vm" / f"{cloud}.yaml").read_text())
    as_ray_up_leaves_it(copy.deepcopy(config), tmp_path)
    gpu = config["available_node_types"]["gpu"]
    assert read_autoscaling_config(tmp_path / NAME) == [
        NodeType("gpu", gpu["resources"], gpu["max_workers"])
    ]
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


def test_machines_of_one_s_own_do_not_say_what_they_have(tmp_path: Path):
    """Then nothing may be refused before they have joined."""
    config = yaml.safe_load((REPO_ROOT / "cluster" / "vm" / "on_premise.yaml").read_text())
    as_ray_up_leaves_it(config, tmp_path)
    assert read_autoscaling_config(tmp_path / NAME) is None


def test_a_head_without_such_a_file_knows_no_types(tmp_path: Path):
    assert read_autoscaling_config(tmp_path / NAME) is None
    for text in ("{}", "[1, 2]", "available_node_types: {a: 3}", "a: b: c"):
        (tmp_path / NAME).write_text(text)
        assert read_autoscaling_config(tmp_path / NAME) is None


def test_the_file_is_that_of_the_autoscaler_that_runs(tmp_path: Path):
    """One that lies in the home folder may be of an earlier cluster."""
    assert find_autoscaling_config() is None
    option = f"--autoscaling-config={tmp_path / NAME}"
    monitor = "/x/ray/autoscaler/_private/monitor.py"
    with subprocess.Popen(
        [sys.executable, "-c", "input()", monitor, "--logs-dir=/x", option], stdin=subprocess.PIPE
    ) as process:
        try:
            assert find_autoscaling_config() == tmp_path / NAME
        finally:
            process.kill()
