"""Nodes that a training cluster loses: said, waited for, and not for ever."""

import signal
import threading

import pytest

from launcher.errors import LaunchError, Preempted
from launcher.room_watch import RoomWatch, interruptible, watching
from state.config_cluster import ClusterConfig

NODE = {"CPU": 2.0, "memory": 1e9}


def make_watch(said: list[str], wait_s: float = 60) -> RoomWatch:
    wanted = ClusterConfig(num_workers=4, cpus_per_worker=1)
    return RoomWatch(wanted, wait_s, said.append)


def test_a_cluster_with_room_is_not_spoken_of():
    said: list[str] = []
    watch = make_watch(said)
    for now_s in (0, 1000, 2000):
        watch.look([NODE, NODE], now_s)
    assert said == []


def test_a_lost_node_is_said_once_and_its_return_too():
    said: list[str] = []
    watch = make_watch(said)
    watch.look([NODE], 10)
    watch.look([NODE], 40)
    assert len(said) == 1
    assert "4 workers with 1 CPU each" in said[0]
    assert "2 CPUs and 0 GPUs on 1 nodes, enough for 2" in said[0]
    assert "at most 60 s" in said[0]
    watch.look([NODE, NODE], 65)
    assert said[1] == "the cluster has room again, after 55 s"
    # The wait begins anew with the next loss.
    watch.look([NODE], 100)
    watch.look([NODE], 159)
    with pytest.raises(LaunchError, match=r"60 s were waited .* cluster.num_workers=2"):
        watch.look([NODE], 160)


def test_without_any_room_fewer_workers_are_not_advised():
    watch = make_watch([])
    watch.look([], 0)
    with pytest.raises(LaunchError, match="0 CPUs and 0 GPUs on 0 nodes") as caught:
        watch.look([], 60)
    assert "cluster.num_workers=" not in str(caught.value)


def test_a_notice_while_nodes_are_missing_is_not_waited_with():
    """No worker is there to answer it; with all of them there, they do."""
    wanted = ClusterConfig(num_workers=4, cpus_per_worker=1)
    watch = RoomWatch(wanted, 60, [].append, lambda: True)
    watch.look([NODE, NODE], 0)
    with (
        pytest.raises(Preempted, match="asked to leave while nodes are missing"),
        interruptible() as give_up,
        watching(watch, lambda: [NODE], give_up, between_s=0.01),
    ):
        threading.Event().wait(30)


def test_the_block_ends_with_the_reason_of_the_watch():
    ended = threading.Event()

    def train() -> None:
        assert ended.wait(10)
        raise KeyboardInterrupt

    with (
        pytest.raises(LaunchError, match="0 s were waited"),
        watching(make_watch([], wait_s=0), lambda: [NODE], ended.set, between_s=0.01),
    ):
        train()


def test_a_block_that_waits_is_interrupted_and_the_signal_handler_put_back():
    before = signal.getsignal(signal.SIGUSR2)
    with (
        pytest.raises(LaunchError, match="0 s were waited"),
        interruptible() as give_up,
        watching(make_watch([], wait_s=0), lambda: [NODE], give_up, between_s=0.01),
    ):
        threading.Event().wait(30)
    assert signal.getsignal(signal.SIGUSR2) == before


def test_nodes_that_cannot_be_listed_are_looked_at_again():
    answers = iter([RuntimeError("no head"), []])
    ended = threading.Event()

    def list_nodes() -> list:
        answer = next(answers, [])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def train() -> None:
        assert ended.wait(10)
        raise KeyboardInterrupt

    with (
        pytest.raises(LaunchError, match="0 s were waited"),
        watching(make_watch([], wait_s=0), list_nodes, ended.set, between_s=0.01),
    ):
        train()


def test_a_block_that_ends_is_not_interrupted_afterwards():
    interrupts: list[str] = []

    def give_up() -> None:
        interrupts.append("late")

    with watching(make_watch([], wait_s=0), lambda: [NODE], give_up, between_s=60):
        pass
    assert interrupts == []


def test_an_error_of_the_block_is_its_own():
    with (
        pytest.raises(KeyError, match="mine"),
        watching(make_watch([]), lambda: [NODE, NODE], lambda: None, between_s=0.01),
    ):
        raise KeyError("mine")
