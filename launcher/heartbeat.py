"""Where each training worker is, in a file of the run folder, so that one that hangs is named.

A worker writes its step and stage before it begins the stage, from the thread that trains: what
hangs, stops or is stopped writes no more. When a collective operation times out, those that
waited read what the others wrote last. Tests: ``pytest tests/unit/launcher/test_heartbeat.py``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from launcher.run_folder import RunFolder
from state.config import TrainConfig
from state.training.engine import Engine
from state.training.fault_log import FaultLog
from state.training.loop import Batch, BatchSource

logger = logging.getLogger(__name__)

_RECORD_BYTES = 512
_LARGEST_SHARE = 0.01
_SPARE_S = 0.5
_GRACE_S = 3.0
# gloo and NCCL, whatever the operation.
_TIMED_OUT = re.compile("timed out|timeout", re.IGNORECASE)


class HungWorkerError(RuntimeError):
    """Some worker does not answer; the group may be started again."""


@dataclass(frozen=True)
class Beat:
    """What a worker wrote last."""

    rank: int
    host: str
    pid: int
    step: int
    """Optimiser step under way."""
    order: int
    """Stages begun so far: less than the others' is behind them."""
    stage: str
    """What the worker began, such as "reading its batch"."""
    wall_s: float
    """When, seconds since 1970."""
    monotonic_s: float
    """When, by the host's clock that nobody sets."""
    has_waited: bool = False
    """Whether it waited for another one until the time was up."""

    def age_s(self) -> float:
        """Return how long ago that was, in seconds."""
        if self.host == socket.gethostname():
            return max(0.0, time.monotonic() - self.monotonic_s)
        return max(0.0, time.time() - self.wall_s)


class Heartbeat:
    """The file of one worker.

    Costs one write of 512 bytes a stage, which the system keeps in memory; where the run
    folder's storage takes long over it, so few writes that they take 1 % of the time.
    """

    def __init__(self, folder: RunFolder, rank: int, world_size: int) -> None:
        self._folder, self._world_size = folder, world_size
        path = _path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("wb", buffering=0)
        self._beat = Beat(rank, socket.gethostname(), os.getpid(), 0, 0, "", 0.0, 0.0)
        self._opened_s, self._spent_s = time.monotonic(), 0.0
        self.begin("building model and data")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.close()

    def begin(self, stage: str, step: int | None = None) -> None:
        """Write that a stage begins, in this step or the one before."""
        now_s = time.monotonic()
        self._beat = replace(
            self._beat,
            step=self._beat.step if step is None else step,
            order=self._beat.order + 1,
            stage=stage,
            wall_s=time.time(),
            monotonic_s=now_s,
        )
        if self._spent_s < _LARGEST_SHARE * (now_s - self._opened_s) + _SPARE_S:
            self._write()

    def _write(self) -> None:
        started_s = time.monotonic()
        record = json.dumps(asdict(self._beat)).encode().ljust(_RECORD_BYTES)
        # Of failing storage others speak, and are heard: this is only a help.
        with suppress(OSError):
            os.pwrite(self._handle.fileno(), record, 0)
        self._spent_s += time.monotonic() - started_s

    @contextmanager
    def naming_hung_workers(self, timeout_s: float) -> Iterator[None]:
        """Turn the timeout of a collective operation into an error that names who hangs.

        Raises
        ------
        HungWorkerError
            With the worker, its host and process, its step and stage, and for how long.
        """
        try:
            yield
        except RuntimeError as error:
            # A worker alone waits for nobody: what timed out is something else.
            if self._world_size == 1 or not _TIMED_OUT.search(str(error)):
                raise
            self._beat = replace(self._beat, has_waited=True)
            self._write()
            # The others that waited began to wait a little later.
            time.sleep(_GRACE_S)
            message = explain_timeout(self.read_all(), timeout_s, self._world_size)
            self._note(message)
            raise HungWorkerError(message) from error

    def _note(self, message: str) -> None:
        logger.error(message)
        waiting = [beat.rank for beat in self.read_all() if beat.has_waited]
        # With a full disk nobody's beat says that it waited.
        if self._beat.rank == min(waiting, default=self._beat.rank):
            FaultLog(self._folder.path).add("hung_worker", message, step=self._beat.step)

    def read_all(self) -> list[Beat]:
        """Return what all workers wrote last, in rank order; without those that wrote nothing."""
        return [
            beat
            for rank in range(self._world_size)
            if (beat := read_beat(self._folder, rank)) is not None
        ]


def read_beat(folder: RunFolder, rank: int) -> Beat | None:
    """Return what a worker wrote last; None: nothing that is whole."""
    try:
        return Beat(**json.loads(_path(folder, rank).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def explain_timeout(beats: Sequence[Beat], timeout_s: float, world_size: int) -> str:
    """Say which workers the others waited for."""
    absent = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    if absent:
        return (
            f"no word of {'rank' if len(absent) == 1 else 'ranks'} {', '.join(map(str, absent))} "
            f"in cluster.timeout_s = {timeout_s:g} s, not even of having begun: look at "
            f"logs/train_rank{absent[0]}.log and at the machine"
        )
    silent = [beat for beat in beats if not beat.has_waited]
    if not silent:
        return (
            f"all workers waited for each other for cluster.timeout_s = {timeout_s:g} s, and none "
            "hangs: look at the network between their hosts"
        )
    behind = min((beat.step, beat.order) for beat in silent)
    named = "; ".join(
        f"rank {beat.rank} on host {beat.host} (process {beat.pid}) has been in step {beat.step}, "
        f"{beat.stage}, for {beat.age_s():.0f} s"
        for beat in silent
        if (beat.step, beat.order) == behind
    )
    return (
        f"a worker hangs: {named}. The others waited for cluster.timeout_s = {timeout_s:g} s; "
        "raise that if it is only slow"
    )


class WatchedEngine(Engine):
    """An engine that writes what it begins."""

    def __init__(self, heartbeat: Heartbeat, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._heartbeat = heartbeat

    def backward(self, batch: tuple[Tensor, ...]) -> Tensor:  # noqa: D102
        self._heartbeat.begin("computing loss and gradients")
        return super().backward(batch)

    def step(self, lr: float) -> None:  # noqa: D102
        self._heartbeat.begin("applying gradients")
        super().step(lr)

    def sum_over_ranks(self, values: Tensor) -> Tensor:  # noqa: D102
        self._heartbeat.begin("averaging losses")
        return super().sum_over_ranks(values)

    def evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:  # noqa: D102
        self._heartbeat.begin("validating")
        return super().evaluate(batch)

    def save(self, folder: Path) -> None:  # noqa: D102
        self._heartbeat.begin("saving a checkpoint")
        super().save(folder)

    def load(self, folder: Path) -> None:  # noqa: D102
        self._heartbeat.begin("restoring a checkpoint")
        super().load(folder)


def watched(
    source: BatchSource[Batch], heartbeat: Heartbeat, engine: Engine, settings: TrainConfig
) -> BatchSource[Batch]:
    """Return the source, with a beat before each of its training batches is read."""

    @contextmanager
    def open_train(position: int) -> Iterator[Iterator[Batch]]:
        with source.open_train(position) as batches:
            first_step = position // engine.sets_per_step + 1
            yield _beat_before_each(batches, heartbeat, first_step, settings.grad_accum_steps)

    return replace(source, open_train=open_train)


def _beat_before_each(
    batches: Iterator[Batch], heartbeat: Heartbeat, first_step: int, grad_accum_steps: int
) -> Iterator[Batch]:
    for number in count():
        heartbeat.begin("reading its batch", first_step + number // grad_accum_steps)
        yield next(batches)


def _path(folder: RunFolder, rank: int) -> Path:
    return folder.logs / f"heartbeat_rank{rank}.json"
