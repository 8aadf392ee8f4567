"""Connect to a Ray cluster, or start one on this machine, and run tasks on it.

Connecting is lazy: a run whose stages are all finished never starts Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayTaskError

from data_store.schema import UserError
from launcher.errors import LaunchError
from launcher.preflight import refuse_shortage, require_room
from launcher.progress import Reporter
from launcher.ray_nodes import RaySupply, check_other_nodes
from launcher.training import TrainingConfig
from state.config_cluster import ClusterConfig

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_TASK_RETRIES = 3
_CONNECT_TIMEOUT_S = 10.0


class RayCluster:
    """A Ray cluster, connected on first use.

    Parameters
    ----------
    address
        Address of a running cluster; None takes ``RAY_ADDRESS``, or else starts a local Ray.
    reporter
        Where progress is shown.
    wait_resources_s
        Seconds to wait for CPUs, GPUs and nodes of a running cluster.
    """

    def __init__(self, address: str | None, reporter: Reporter, wait_resources_s: float) -> None:
        self.wait_resources_s = wait_resources_s
        """Seconds to wait for CPUs, GPUs and nodes."""
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        self._reporter = reporter
        self._connected_here = False

    def connect(self) -> None:
        """Connect, or start a local Ray; does nothing when already connected.

        Raises
        ------
        LaunchError
            When no cluster answers at the address, or it is one of Ray Client.
        """
        if ray.is_initialized():
            return
        if (self._address or "").startswith("ray://"):
            raise LaunchError(
                f"--address {self._address}: training does not run over Ray Client. From outside "
                "the cluster: statewide submit CONFIG --address http://HEAD:8265; on one of its "
                "machines: --address HEAD:6379"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        where = self._address or "a local Ray on this machine"
        self._reporter.say(f"Ray: connecting to {where}", "dim")
        try:
            _knock(self._address)
            with own_signal_handlers():
                ray.init(
                    address=self._address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise LaunchError(
                f"no Ray cluster can be used at {where}: {error}\nCheck the address (--address "
                "or RAY_ADDRESS) and that RAY_AUTH_MODE=token is set if the cluster asks for a "
                "token, or leave the address out to start a local Ray"
            ) from None
        self._connected_here = True

    def close(self) -> None:
        """Disconnect, and stop the local Ray if this object started it."""
        if self._connected_here:
            ray.shutdown()
            self._connected_here = False

    def require(self, config: TrainingConfig) -> None:
        """Wait until the cluster holds the training workers, and check that its nodes fit.

        A Ray that was started here cannot grow, so there is nothing to wait for.

        Raises
        ------
        LaunchError
            Saying what was asked for, what exists, and three ways out (Ray itself would wait for
            ever); or which nodes have other versions or do not share the storage.
        """
        self._require_room(config.cluster)
        if self._address is None:
            return
        num_others = check_other_nodes(config)
        if num_others:
            self._reporter.say(
                f"other nodes: {num_others}, with the same versions and storage", "dim"
            )

    def require_task(self, wanted: ClusterConfig) -> None:
        """Wait until the cluster holds one task with the CPUs and GPU of a training worker.

        Raises
        ------
        LaunchError
            As ``require``.
        """
        self._require_room(wanted.model_copy(update={"num_workers": 1}))

    def _require_room(self, wanted: ClusterConfig) -> None:
        self.connect()
        supply = RaySupply()
        if self._address is None:
            refuse_shortage(wanted, supply.nodes())
        else:
            require_room(wanted, supply, wait_s=self.wait_resources_s, say=self._reporter.say)

    def run_tasks(
        self, task: Callable[[Item], Result], items: Sequence[Item], *, what: str, unit: str
    ) -> Iterator[Result]:
        """Run ``task`` on each item as Ray tasks and yield the results in order.

        At most twice as many tasks as the cluster has CPUs are in flight, so that a long list
        neither floods the scheduler nor piles up results.
        """
        self.connect()
        remote = ray.remote(max_retries=_TASK_RETRIES)(_call)
        task_ref = ray.put(task)
        limit = 2 * max(1, int(_resources().get("CPU", 1)))
        with self._reporter.track(what, sum(map(size_of, items)), unit) as tracker:
            waiting: deque[tuple[Item, Any]] = deque()
            pending = iter(items)
            try:
                while True:
                    while len(waiting) < limit and (item := next(pending, None)) is not None:
                        needs = remote.options(**_needs_of(item))
                        waiting.append((item, needs.remote(task_ref, item)))
                    if not waiting:
                        return
                    item, reference = waiting.popleft()
                    result: Result = _get(reference)
                    tracker.advance(size_of(item))
                    yield result
            finally:
                # Empty unless a task failed, or the caller did and asks for no more results.
                for _, other in waiting:
                    ray.cancel(other, force=True)


class ThisProcess:
    """Runs everything in this process, one task after another (``--local``)."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def close(self) -> None:
        """Do nothing: there is nothing to stop."""

    def require(self, config: TrainingConfig) -> None:
        """Check that a GPU is there if one was asked for.

        Raises
        ------
        LaunchError
            When ``use_gpu`` is set on a machine without a usable GPU.
        """
        self.require_task(config.cluster)

    def require_task(self, wanted: ClusterConfig) -> None:
        """Check that a GPU is there if one was asked for.

        Raises
        ------
        LaunchError
            As ``require``.
        """
        if wanted.use_gpu and not torch.cuda.is_available():
            raise LaunchError(
                "cluster.use_gpu = true, but torch finds no CUDA GPU in this process. Set "
                "cluster.use_gpu=false (embed apply: --cpu), or see: statewide doctor"
            )

    def run_tasks(
        self, task: Callable[[Item], Result], items: Sequence[Item], *, what: str, unit: str
    ) -> Iterator[Result]:
        """Run ``task`` on each item here and yield the results in order."""
        with self._reporter.track(what, sum(map(size_of, items)), unit) as tracker:
            for item in items:
                result = task(item)
                tracker.advance(size_of(item))
                yield result


def size_of(item: Any) -> int:
    """Return how much an item counts in the progress: its ``num_cells``, or 1."""
    return int(getattr(item, "num_cells", 1))


@contextmanager
def own_signal_handlers() -> Iterator[None]:
    """Keep this process's answer to SIGINT and SIGTERM: Ray puts its own in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _knock(address: str | None) -> None:
    """Open and close a connection to ``host:port``: Ray itself would retry for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _needs_of(item: Any) -> dict[str, int]:
    """Return the CPUs and GPUs that an item asks for: its ``num_cpus`` and ``num_gpus``."""
    return {"num_cpus": getattr(item, "num_cpus", 1), "num_gpus": getattr(item, "num_gpus", 0)}


def _call(task: Callable[[Any], Any], item: Any) -> Any:
    return task(item)


def _get(reference: Any) -> Any:
    """Fetch a result; a user's mistake comes back as itself, without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, OSError)):
            raise error.cause from None
        raise
