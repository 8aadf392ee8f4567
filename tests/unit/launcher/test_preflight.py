"""Is there room for the workers? Against a cluster in memory whose clock is moved by waiting."""

import math
from collections.abc import Callable
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import LaunchError
from launcher.preflight import (
    NodeType,
    describe_demand,
    refuse_shortage,
    require_room,
    workers_that_fit,
)
from state.config_cluster import ClusterConfig


class Cluster:
    """Nodes that join at their times; ``busy`` of what a node has is in use by others."""

    def __init__(
        self,
        joining: list[tuple[float, dict[str, float]]],
        types: list[NodeType] | None = None,
        busy_until: float = 0.0,
    ) -> None:
        self.joining, self.types, self.busy_until = joining, types, busy_until
        self.now = 0.0
        self.reserved: list[dict[str, float]] = []
        self.said: list[str] = []

    def nodes(self):
        return [resources for when, resources in self.joining if when <= self.now]

    def node_types(self):
        return self.types

    @contextmanager
    def reserve(self, bundles):
        self.reserved = list(bundles)
        try:
            yield self._wait
        finally:
            self.reserved = []

    def _wait(self, seconds: float) -> bool:
        self.now += seconds
        if self.now < self.busy_until:
            return False
        left = [dict(node) for node in self.nodes()]
        for bundle in self.reserved:
            for node in left:
                if all(node.get(kind, 0) >= need for kind, need in bundle.items()):
                    for kind, need in bundle.items():
                        node[kind] -= need
                    break
            else:
                return False
        return True

    def require(self, wanted: ClusterConfig, wait_s: float = 100.0) -> None:
        require_room(wanted, self, wait_s=wait_s, say=self.said.append, clock=lambda: self.now)


def wants(num_workers: int, cpus: int = 1, use_gpu: bool = False) -> ClusterConfig:
    return ClusterConfig(num_workers=num_workers, cpus_per_worker=cpus, use_gpu=use_gpu)


HEAD = {"CPU": 0.0}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}
GPU_TYPE = NodeType("gpu", GPU_NODE, 2)


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(LaunchError) as caught:
        action()
    return str(caught.value)


def test_room_that_is_there_is_taken_at_once_and_given_back():
    cluster = Cluster([(0, HEAD), (0, GPU_NODE)])
    cluster.require(wants(4, cpus=4, use_gpu=True))
    assert cluster.now <= 5
    assert cluster.reserved == []
    assert cluster.said == []


def test_a_node_that_joins_in_time_is_waited_for():
    cluster = Cluster([(0, HEAD), (0, GPU_NODE), (70, GPU_NODE)], [GPU_TYPE])
    cluster.require(wants(8, use_gpu=True))
    assert 70 <= cluster.now <= 75
    assert len(cluster.said) == 2
    assert "16 CPUs and 4 GPUs on 2 nodes" in cluster.said[0]


def test_the_deadline_says_what_was_asked_what_exists_and_three_ways_out():
    cluster = Cluster([(0, HEAD), (0, GPU_NODE), (999, GPU_NODE)])
    said = complaint(lambda: cluster.require(wants(8, cpus=2, use_gpu=True), wait_s=60))
    assert 60 <= cluster.now <= 66
    for part in (
        "cluster.num_workers = 8 workers with 2 CPU and 1 GPU each were asked for",
        "60 s were waited",
        "16 CPUs and 4 GPUs on 2 nodes, enough for 4",
        "cluster.num_workers=4; a larger cluster (--address); cluster.use_gpu=false",
    ):
        assert part in said
    assert cluster.reserved == []


def test_a_cluster_in_use_is_not_called_too_small():
    cluster = Cluster([(0, {"CPU": 8.0})], busy_until=math.inf)
    said = complaint(lambda: cluster.require(wants(8), wait_s=10))
    assert "enough for 8, but others use them" in said
    assert "num_workers=8;" not in said


def test_a_cluster_that_becomes_free_is_taken():
    cluster = Cluster([(0, {"CPU": 8.0})], busy_until=40)
    cluster.require(wants(8))
    assert 40 <= cluster.now <= 45


def test_a_worker_that_no_node_type_can_hold_is_refused_at_once():
    cluster = Cluster([(0, HEAD)], [GPU_TYPE, NodeType("small", {"CPU": 2.0}, 10)])
    said = complaint(lambda: cluster.require(wants(1, cpus=17, use_gpu=True)))
    assert cluster.now == 0
    assert "no node type that the autoscaler may add can hold one" in said
    assert "gpu (16 CPU, 4 GPU, at most 2 nodes); small (2 CPU, 0 GPU, at most 10 nodes)" in said


def test_more_workers_than_all_types_together_are_refused_at_once():
    cluster = Cluster([(0, HEAD)], [GPU_TYPE])
    said = complaint(lambda: cluster.require(wants(9, use_gpu=True)))
    assert cluster.now == 0
    assert "may grow to hold 8 of them" in said
    assert "cluster.num_workers=8" in said


def test_a_type_without_limit_can_hold_any_number():
    cluster = Cluster([(30, {"CPU": 640.0})], [NodeType("cpu", {"CPU": 64.0}, math.inf)])
    cluster.require(wants(640))


def test_zero_seconds_still_look_once():
    Cluster([(0, {"CPU": 2.0})]).require(wants(2), wait_s=0)
    assert "0 s were waited" in complaint(
        lambda: Cluster([(50, {"CPU": 2.0})]).require(wants(2), wait_s=0)
    )


def test_a_cluster_that_cannot_grow_is_refused_without_waiting():
    refuse_shortage(wants(4), [{"CPU": 3.0}, {"CPU": 1.0}])
    # Eight CPUs in all, but a worker is never spread over nodes.
    said = complaint(lambda: refuse_shortage(wants(2, cpus=3), [{"CPU": 4.0}, {"CPU": 2.0}]))
    assert "enough for 1" in said


@given(
    cpus=st.integers(0, 64),
    gpus=st.integers(0, 8),
    each=st.integers(1, 32),
    use_gpu=st.booleans(),
)
def test_as_many_workers_fit_as_can_be_taken_one_by_one(cpus, gpus, each, use_gpu):
    node = {"CPU": float(cpus), "GPU": float(gpus)}
    taken = 0
    while node["CPU"] >= each and (node["GPU"] >= 1 or not use_gpu):
        node["CPU"] -= each
        node["GPU"] -= use_gpu
        taken += 1
    total = {"CPU": float(cpus), "GPU": float(gpus)}
    assert workers_that_fit(total, wants(1, each, use_gpu)) == taken


def test_demand_in_words():
    assert describe_demand(wants(16, 8, use_gpu=True)) == "16 workers with 8 CPU and 1 GPU each"
