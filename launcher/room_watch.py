"""Watch a cluster that trains: say when it has lost nodes, and do not wait for them for ever.

Ray Train starts a failed group of workers again, but where a node is gone it waits for another
without a word and without an end. Tests: ``pytest tests/unit/launcher/test_room_watch.py``.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from launcher.errors import LaunchError, Preempted
from launcher.preflight import describe_demand, describe_nodes, workers_that_fit
from state.config_cluster import ClusterConfig

SECONDS_BETWEEN_LOOKS = 5.0

logger = logging.getLogger(__name__)


class RoomWatch:
    """What is known of the room for the workers.

    Parameters
    ----------
    wanted
        The workers.
    wait_s
        Seconds that a shortage may last.
    say
        Shows a line to the user.
    is_stop_asked
        Tells whether this process is about to be ended.
    """

    def __init__(
        self,
        wanted: ClusterConfig,
        wait_s: float,
        say: Callable[[str], object],
        is_stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._wanted, self._wait_s, self._say = wanted, wait_s, say
        self._is_stop_asked = is_stop_asked
        self._short_since_s: float | None = None

    def look(self, nodes: Sequence[Mapping[str, float]], now_s: float) -> None:
        """Take note of the living nodes.

        Raises
        ------
        LaunchError
            When the cluster has been too small for too long.
        Preempted
            When it is too small and this process was asked to leave: no worker is there to save.
        """
        fits = sum(workers_that_fit(node, self._wanted) for node in nodes)
        if fits >= self._wanted.num_workers:
            if self._short_since_s is not None:
                self._say(f"the cluster has room again, after {now_s - self._short_since_s:.0f} s")
            self._short_since_s = None
            return
        if self._is_stop_asked():
            raise Preempted(
                "asked to leave while nodes are missing: nothing was trained since the last "
                "checkpoint. Run the same command again to go on from there"
            )
        lost = (
            f"training needs {describe_demand(self._wanted)}, but the cluster lost nodes and has "
            f"{describe_nodes(nodes)}, enough for {fits}"
        )
        if self._short_since_s is None:
            self._short_since_s = now_s
            self._say(
                f"{lost}. It goes on from its last checkpoint when they are back; waiting at most "
                f"{self._wait_s:g} s (--wait-resources)"
            )
        elif now_s - self._short_since_s >= self._wait_s:
            fewer = f", with cluster.num_workers={fits}," if fits else ""
            raise LaunchError(
                f"{lost}, and {self._wait_s:g} s were waited for them (--wait-resources). Start "
                "the nodes again (ray status lists those that are there) and run the same "
                f"command: it goes on from the last checkpoint. Or run it{fewer} on another "
                "cluster (--address)"
            )


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Give a function that interrupts the block from another thread, whatever it waits for.

    A signal of its own: Ray Train answers SIGINT by asking its controller to stop, and waits
    for the answer of one that itself waits for nodes. Outside of the main thread, where no
    signal arrives, the function does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def end(number: int, frame: FrameType | None) -> None:
        # Of other errors, Ray's waiting takes no notice.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, end)
    try:
        yield lambda: os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


@contextmanager
def watching(
    watch: RoomWatch,
    list_nodes: Callable[[], Sequence[Mapping[str, float]]],
    give_up: Callable[[], object],
    between_s: float = SECONDS_BETWEEN_LOOKS,
) -> Iterator[None]:
    """Watch from a thread while the block runs.

    Parameters
    ----------
    watch
        Decides.
    list_nodes
        Returns the resources of each living node.
    give_up
        Called when the watch has waited too long; must end the block with ``KeyboardInterrupt``.
    between_s
        Seconds between looks.

    Raises
    ------
    LaunchError, Preempted
        The watch's, in place of the interrupt that it ended the block with.
    """
    finished, ending = threading.Event(), threading.Lock()
    found: list[LaunchError | Preempted] = []

    def follow() -> None:
        while not finished.wait(between_s):
            try:
                nodes = list_nodes()
            except Exception as error:  # noqa: BLE001 - Ray's errors of a lost head are many
                logger.warning("the nodes of the cluster cannot be listed: %r", error)
                continue
            try:
                watch.look(nodes, time.monotonic())
            except (LaunchError, Preempted) as error:
                with ending:
                    if not finished.is_set():
                        found.append(error)
                        give_up()
                return

    thread = threading.Thread(target=follow, name="room-watch", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if found:
            raise found[0] from None
        raise
    finally:
        # From here on nobody interrupts.
        with ending:
            finished.set()
        thread.join()
