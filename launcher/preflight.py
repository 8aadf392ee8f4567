"""Wait for room for the training workers, which an autoscaler may have to make.

Ray Train would wait for ever. Here the wait has an end, and at its end a message says what was
asked for, what exists, and three ways out. ``launcher.node_check`` looks at the nodes themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from launcher.errors import LaunchError
from state.config_cluster import ClusterConfig

_SECONDS_BETWEEN_LINES = 30.0
_LONGEST_LOOK_S = 5.0


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler may add."""

    name: str
    resources: Mapping[str, float]
    max_nodes: float
    """``math.inf`` where there is no limit."""


class Supply(Protocol):
    """What a cluster has and may get."""

    def nodes(self) -> Sequence[Mapping[str, float]]:
        """Return the total resources of each living node."""

    def node_types(self) -> Sequence[NodeType] | None:
        """Return what the autoscaler may add; None where that is not known."""

    def reserve(
        self, bundles: Sequence[Mapping[str, float]]
    ) -> AbstractContextManager[Callable[[float], bool]]:
        """Ask for bundles, which also wakes the autoscaler, and let go of them afterwards.

        The callable waits some seconds and tells whether all of them are held.
        """


def bundle_of(wanted: ClusterConfig) -> dict[str, float]:
    """Return what one worker asks for."""
    return {"CPU": wanted.cpus_per_worker, **({"GPU": 1} if wanted.use_gpu else {})}


def workers_that_fit(node: Mapping[str, float], wanted: ClusterConfig) -> int:
    """Count the workers that one node can hold: a worker is never spread over nodes."""
    return min(math.floor(node.get(kind, 0) / need) for kind, need in bundle_of(wanted).items())


def require_room(
    wanted: ClusterConfig,
    supply: Supply,
    *,
    wait_s: float,
    say: Callable[[str], object],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return once the cluster holds all workers at the same time.

    Raises
    ------
    LaunchError
        At once if no node type can hold one worker or all types together cannot hold them all;
        else after ``wait_s`` seconds.
    """
    _refuse_impossible(wanted, supply)
    deadline = clock() + wait_s
    next_line = clock() + _SECONDS_BETWEEN_LINES
    with supply.reserve([bundle_of(wanted)] * wanted.num_workers) as is_held_within:
        while True:
            remaining = deadline - clock()
            if is_held_within(max(1.0, min(remaining, _LONGEST_LOOK_S))):
                return
            if not clock() < deadline:
                break
            if clock() >= next_line:
                next_line = clock() + _SECONDS_BETWEEN_LINES
                say(
                    f"waiting for {describe_demand(wanted)}: {describe_nodes(supply.nodes())}; "
                    f"{deadline - clock():.0f} s left (--wait-resources)"
                )
    raise LaunchError(_explain_shortage(wanted, supply, wait_s))


def describe_demand(wanted: ClusterConfig) -> str:
    """Say what training asks for."""
    gpu_each = " and 1 GPU" if wanted.use_gpu else ""
    return f"{wanted.num_workers} workers with {wanted.cpus_per_worker} CPU{gpu_each} each"


def refuse_shortage(wanted: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse more workers than a cluster that cannot grow can hold.

    Raises
    ------
    LaunchError
        Saying what was asked for, what exists, and three ways out.
    """
    fits = sum(workers_that_fit(node, wanted) for node in nodes)
    if fits < wanted.num_workers:
        raise LaunchError(
            f"{_asked(wanted)}, but the cluster has {describe_nodes(nodes)}, enough for {fits}. "
            f"{_ways_out(wanted, fits)}"
        )


def read_autoscaling_config(path: Path) -> list[NodeType] | None:
    """Read the node types of an autoscaler's file, as ``ray up`` leaves it on the head.

    None if it cannot be read, or if a type does not say what its nodes have, as with machines of
    one's own.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        types = [
            _node_type(name, kind, config) for name, kind in config["available_node_types"].items()
        ]
    except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError):
        return None
    growing = [kind for kind in types if kind.max_nodes > 0]
    return growing if all(kind.resources for kind in growing) else None


def _node_type(name: str, kind: Mapping[str, Any], config: Mapping[str, Any]) -> NodeType:
    all_workers = float(config.get("max_workers", math.inf))
    # Ray adds no second node of the head's type unless the file says so.
    default = 0.0 if name == config.get("head_node_type") else all_workers
    return NodeType(
        name,
        {what: float(amount) for what, amount in kind["resources"].items()},
        min(float(kind.get("max_workers", default)), all_workers),
    )


def _refuse_impossible(wanted: ClusterConfig, supply: Supply) -> None:
    """Refuse at once what no waiting can mend, where the node types are known."""
    types = supply.node_types()
    if types is None:
        return
    nodes = supply.nodes()
    per_type = {kind.name: workers_that_fit(kind.resources, wanted) for kind in types}
    here = sum(workers_that_fit(node, wanted) for node in nodes)
    listing = "; ".join(
        f"{kind.name} ({_describe(kind.resources)}, at most {kind.max_nodes:g} nodes)"
        for kind in types
    )
    if not here and not any(per_type.values()):
        raise LaunchError(
            f"{_asked(wanted)}, but no node of the cluster and no node type that the autoscaler "
            f"may add can hold one of them: {listing or 'there are no node types'}. "
            f"{_ways_out(wanted, 0)}"
        )
    # A node that is here may be one of those that the types count.
    most = max(
        here, sum(per_type[kind.name] * kind.max_nodes for kind in types if per_type[kind.name])
    )
    if most < wanted.num_workers:
        raise LaunchError(
            f"{_asked(wanted)}, but the cluster has {describe_nodes(nodes)} and may grow to hold "
            f"{most:g} of them: {listing}. {_ways_out(wanted, int(most))}"
        )


def _explain_shortage(wanted: ClusterConfig, supply: Supply, wait_s: float) -> str:
    nodes = supply.nodes()
    fits = sum(workers_that_fit(node, wanted) for node in nodes)
    if fits >= wanted.num_workers:
        state = (
            f"the cluster has {describe_nodes(nodes)}, enough for {fits}, but others use them "
            "(ray status shows who)"
        )
        fits = 0
    else:
        known = supply.node_types()
        growth = (
            "an autoscaler added none, or there is none"
            if known is None
            else "the autoscaler did not add its nodes in time (see its log: ray monitor)"
        )
        state = f"the cluster has {describe_nodes(nodes)}, enough for {fits}; {growth}"
    return (
        f"{_asked(wanted)}, and {wait_s:g} s were waited for them (--wait-resources), but {state}. "
        f"{_ways_out(wanted, fits)}"
    )


def _asked(wanted: ClusterConfig) -> str:
    each = describe_demand(wanted).removeprefix(f"{wanted.num_workers} ")
    return f"cluster.num_workers = {wanted.num_workers} {each} were asked for"


def _ways_out(wanted: ClusterConfig, fits: int) -> str:
    ways = [
        f"cluster.num_workers={fits}" if fits else "a smaller cluster.cpus_per_worker",
        "a larger cluster (--address)",
        "cluster.use_gpu=false (embed apply: --cpu)"
        if wanted.use_gpu
        else "--local, to train in this process",
    ]
    return f"Use one of: {'; '.join(ways)}"


def describe_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    """Say what nodes have in all."""
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"


def _describe(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
