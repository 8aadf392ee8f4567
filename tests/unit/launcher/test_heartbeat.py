"""The worker that the others waited for is named, and nobody else."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.heartbeat import (
    Beat,
    Heartbeat,
    HungWorkerError,
    explain_timeout,
    read_beat,
    watched,
)
from launcher.run_folder import RunFolder
from state.config import TrainConfig
from state.training.fault_log import FaultLog
from state.training.loop import BatchSource


def beat(rank: int, order: int, stage: str, *, has_waited: bool = False, ago_s: float = 20) -> Beat:
    then_s = time.monotonic() - ago_s
    return Beat(rank, socket.gethostname(), 7, 15, order, stage, 0.0, then_s, has_waited)


def test_the_worker_behind_the_others_is_named_with_what_it_began():
    beats = [
        beat(0, 62, "computing loss and gradients", has_waited=True),
        beat(1, 61, "reading its batch", ago_s=21),
        # It came late, and its own time is not up yet.
        beat(2, 62, "computing loss and gradients"),
    ]
    said = explain_timeout(beats, 20, len(beats))
    host = socket.gethostname()
    assert said.startswith(
        f"a worker hangs: rank 1 on host {host} (process 7) has been in step 15, reading its "
        "batch, for 21 s. The others waited for cluster.timeout_s = 20 s"
    )
    assert "rank 0" not in said
    assert "rank 2" not in said


def test_two_that_hang_alike_are_both_named():
    said = explain_timeout(
        [beat(0, 9, "a", has_waited=True), beat(1, 8, "b"), beat(2, 8, "b")], 1, 3
    )
    assert "rank 1 on" in said
    assert "rank 2 on" in said


def test_where_all_waited_the_network_is_suspected():
    said = explain_timeout([beat(rank, 9, "a", has_waited=True) for rank in range(2)], 1, 2)
    assert "none hangs: look at the network" in said


def test_a_worker_that_wrote_nothing_is_named():
    said = explain_timeout([beat(0, 9, "a", has_waited=True)], 20, 2)
    assert said.startswith("no word of rank 1 in cluster.timeout_s = 20 s")
    assert "logs/train_rank1.log" in said


def test_beats_that_cannot_be_written_do_not_hide_who_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launcher.heartbeat._GRACE_S", 0)
    folder = RunFolder(tmp_path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Heartbeat(folder, 1, 2), Heartbeat(folder, 0, 2) as mine:
        monkeypatch.setattr("launcher.heartbeat.os.pwrite", full)
        with pytest.raises(HungWorkerError), mine.naming_hung_workers(20):
            raise RuntimeError("gloo: Timed out waiting 20000ms for recv operation")


def test_a_worker_alone_waits_for_nobody(tmp_path: Path):
    with (
        Heartbeat(RunFolder(tmp_path), 0, 1) as alone,
        pytest.raises(RuntimeError, match="the launch timed out and was terminated"),
        alone.naming_hung_workers(20),
    ):
        raise RuntimeError("CUDA error: the launch timed out and was terminated")


def test_a_timeout_becomes_the_name_and_other_errors_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launcher.heartbeat._GRACE_S", 0)
    folder = RunFolder(tmp_path)
    with Heartbeat(folder, 1, 2) as other:
        other.begin("reading its batch", 3)
    with Heartbeat(folder, 0, 2) as mine:
        mine.begin("reading its batch", 3)
        mine.begin("computing loss and gradients")
        with pytest.raises(HungWorkerError, match="rank 1 on .* in step 3, reading its batch"):
            with mine.naming_hung_workers(20):
                raise RuntimeError("gloo: Timed out waiting 20000ms for recv operation")
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            with mine.naming_hung_workers(20):
                raise RuntimeError("Connection closed by peer")
    (fault,) = FaultLog(tmp_path).read()
    assert (fault.kind, fault.step) == ("hung_worker", 3)


def test_batches_are_announced_before_they_are_read(tmp_path: Path):
    folder = RunFolder(tmp_path)
    seen = []

    @contextmanager
    def open_train(position: int) -> Iterator[Iterator[int]]:
        def batches() -> Iterator[int]:
            while True:
                found = read_beat(folder, 0)
                assert found is not None
                seen.append((found.step, found.stage))
                yield 1

        yield batches()

    source = BatchSource(open_train=open_train, iterate_val=list)
    engine = SimpleNamespace(sets_per_step=8)
    settings = TrainConfig(grad_accum_steps=2)
    with (
        Heartbeat(folder, 0, 1) as heartbeat,
        watched(source, heartbeat, engine, settings).open_train(40) as batches,
    ):
        for _ in range(3):
            next(batches)
    assert seen == [(6, "reading its batch")] * 2 + [(7, "reading its batch")]


def test_what_is_torn_or_absent_is_not_read(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert read_beat(folder, 0) is None
    with Heartbeat(folder, 0, 1):
        pass
    found = read_beat(folder, 0)
    assert found is not None
    assert (found.pid, found.stage) == (os.getpid(), "building model and data")
    (tmp_path / "logs" / "heartbeat_rank0.json").write_bytes(b'{"rank": 0')
    assert read_beat(folder, 0) is None


def test_slow_storage_is_written_to_for_one_percent_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A clock that moves with what happens: 1 ms a stage, 20 ms a write."""
    now_s, num_writes = 0.0, 0

    def write(*args: object) -> None:
        nonlocal now_s, num_writes
        now_s, num_writes = now_s + 0.02, num_writes + 1

    monkeypatch.setattr("launcher.heartbeat.os.pwrite", write)
    monkeypatch.setattr("launcher.heartbeat.time.monotonic", lambda: now_s)
    with Heartbeat(RunFolder(tmp_path), 0, 1) as heartbeat:
        for _ in range(100_000):
            now_s += 0.001
            heartbeat.begin("a stage")
    assert num_writes * 0.02 == pytest.approx(0.01 * now_s + 0.5, rel=0.05)
