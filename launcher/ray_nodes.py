"""The nodes of the connected Ray cluster, as ``preflight`` and ``node_check`` ask for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
from ray._private.state import state as ray_state
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.node_check import NodeOrder, NodeReport, examine_node, open_probe, refuse_unfit
from launcher.preflight import NodeType, read_autoscaling_config
from launcher.training import TrainingConfig
from state.embed_config import EmbedConfig

_CHECK_TIMEOUT_S = 180.0
# How Ray starts its autoscaler on the head.
_MONITOR = "autoscaler/_private/monitor.py"
_CONFIG_OPTION = "--autoscaling-config="


class RaySupply:
    """What the connected cluster has, and what its autoscaler may add."""

    def nodes(self) -> list[Mapping[str, float]]:
        """Return the total resources of each living node."""
        return [node["Resources"] for node in _living_nodes().values()]

    def node_types(self) -> list[NodeType] | None:
        """Return the autoscaler's node types; None where this machine is told none.

        Clusters made by ``ray up`` keep them in a file on the head, some managed ones in
        Ray's store. KubeRay's autoscaler keeps them to itself.
        """
        # Private, and what Ray Train itself asks before it places its workers.
        config = ray_state.get_cluster_config()
        if config is not None and config.node_group_configs:
            return [
                NodeType(
                    group.name,
                    dict(group.resources),
                    math.inf if group.max_count < 0 else group.max_count,
                )
                for group in config.node_group_configs
            ]
        path = find_autoscaling_config()
        return None if path is None else read_autoscaling_config(path)

    @contextmanager
    def reserve(self, bundles: Sequence[Mapping[str, float]]) -> Iterator[Callable[[float], bool]]:
        """Hold bundles in a placement group while the block runs."""
        group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
        try:
            yield lambda seconds: bool(group.wait(seconds))
        finally:
            remove_placement_group(group)


def find_autoscaling_config() -> Path | None:
    """Find the file of the autoscaler that runs on this machine; None where none runs.

    A file that lies about may be that of an earlier cluster.
    """
    for process in psutil.process_iter(["cmdline"]):
        words: list[str] = process.info["cmdline"] or []
        if not any(word.endswith(_MONITOR) for word in words):
            continue
        for word in words:
            if word.startswith(_CONFIG_OPTION):
                return Path(word.removeprefix(_CONFIG_OPTION)).expanduser()
    return None


def check_other_nodes(config: TrainingConfig) -> int:
    """Ask every node but this one for its versions and for the run's storage; count them.

    Raises
    ------
    LaunchError
        Naming the nodes that cannot run this job.
    """
    here = ray.get_runtime_context().get_node_id()
    others = sorted(_living_nodes().keys() - {here})
    if not others:
        return 0
    with open_probe(config.output_dir) as secret:
        orders = [
            NodeOrder(node_id, config.output_dir, secret, _inputs_of(config)) for node_id in others
        ]
        reports, lost = _ask(orders)
        still_there = _living_nodes()
        gone = [order for order in orders if order.node_id not in still_there]
        refuse_unfit(
            reports,
            [order for order in orders if order not in gone],
            {node_id: reason for node_id, reason in lost.items() if node_id in still_there},
        )
    return len(orders) - len(gone)


def _ask(orders: Sequence[NodeOrder]) -> tuple[dict[str, NodeReport], dict[str, str]]:
    """Run the check on every node at once; return the reports, and who gave none and why."""
    task = ray.remote(num_cpus=0, max_retries=1)(examine_node)
    references = {
        order.node_id: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(order.node_id, soft=False)
        ).remote(order)
        for order in orders
    }
    ray.wait(list(references.values()), num_returns=len(orders), timeout=_CHECK_TIMEOUT_S)
    reports: dict[str, NodeReport] = {}
    lost: dict[str, str] = {}
    for node_id, reference in references.items():
        try:
            reports[node_id] = ray.get(reference, timeout=0)
        except GetTimeoutError:
            ray.cancel(reference, force=True)
            lost[node_id] = f"did not answer within {_CHECK_TIMEOUT_S:g} s"
        except RayError as error:
            # The cause, such as "No module named 'launcher'", is the last line.
            lost[node_id] = f"cannot run Statewide: {str(error).strip().splitlines()[-1]}"
    return reports, lost


def _inputs_of(config: TrainingConfig) -> tuple[Path, ...]:
    """Return what the nodes will read; a simulated atlas is made in the run folder."""
    if isinstance(config, EmbedConfig):
        return tuple(dataset.store for dataset in config.datasets.values())
    data_input, embed_file = config.data.input, config.data.embed_file
    made_here = config.simulate is not None
    candidates = [
        config.split.file,
        None if made_here else config.features.path,
        None if made_here or isinstance(data_input, str) else data_input,
        None if isinstance(embed_file, str) else embed_file,
        *config.evaluate.beside,
    ]
    # A glob is no path; the files it stands for are found by the driver.
    return tuple(path for path in candidates if path is not None and path.exists())


def _living_nodes() -> dict[str, dict[str, dict[str, float]]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
