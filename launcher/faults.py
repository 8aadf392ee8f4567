"""Inject the faults of a recipe's ``[faults]`` into a worker, for tests and drills.

They happen where a worker asks for the first batch of a step, or writes a checkpoint, so the
training loop itself knows nothing of them. Each leaves a marker in the run folder first and is not
repeated: a worker group or a command that starts again meets no fault twice. Tested in
``tests/chaos``.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_store.files import write_text_atomically
from data_store.schema import CellBatch, CellCounts
from launcher.errors import LaunchError
from launcher.run_folder import RunFolder
from state.config import TrainConfig
from state.config_cluster import FaultsConfig
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import WEIGHTS_NAME, Progress
from state.training.engine import Engine
from state.training.loop import BatchSource

logger = logging.getLogger(__name__)

_LONGEST_HANG_S = 24 * 3600


class InjectedFaultError(RuntimeError):
    """What ``[faults]`` asked for; no user's mistake, so it is handled as any worker's failure."""


def refuse_impossible(faults: FaultsConfig, world_size: int) -> None:
    """Refuse faults that could not happen, or that nothing would end.

    Raises
    ------
    LaunchError
        Naming the key and what to do.
    """
    asked = faults.model_dump(exclude={"rank"}, exclude_none=True)
    if asked and faults.rank >= world_size:
        raise LaunchError(
            f"faults.rank = {faults.rank} would never happen: {world_size} workers train "
            f"(ranks 0 to {world_size - 1}; with --local only 0)"
        )
    if faults.hang_at_step is not None and world_size == 1:
        raise LaunchError(
            f"faults.hang_at_step = {faults.hang_at_step}: a worker that hangs is found by the "
            "others, and one alone would hang for ever. Set cluster.num_workers to 2 or more, "
            "without --local"
        )


def with_faults(
    source: BatchSource[CellBatch],
    faults: FaultsConfig,
    settings: TrainConfig,
    world_size: int,
    folder: RunFolder,
) -> BatchSource[CellBatch]:
    """Return the source with the faults in its training batches."""
    if not faults.model_dump(exclude={"rank"}, exclude_none=True):
        return source
    sets_per_step = settings.micro_batch_size * settings.grad_accum_steps * world_size

    @contextmanager
    def open_train(position: int) -> Iterator[Iterator[CellBatch]]:
        with source.open_train(position) as batches:
            first_step = position // sets_per_step + 1
            yield _inject(batches, faults, first_step, settings.grad_accum_steps, folder)

    return replace(source, open_train=open_train)


def on_a_disk_that_fills(
    checkpoints: CheckpointFolder, faults: FaultsConfig, folder: RunFolder
) -> CheckpointFolder:
    """Return the checkpoints on a disk that is full when ``faults`` says so."""
    if faults.fill_disk_at_step is None:
        return checkpoints
    return _FullDisk(checkpoints, faults.fill_disk_at_step, folder)


class _FullDisk(CheckpointFolder):
    def __init__(self, real: CheckpointFolder, at_step: int, folder: RunFolder) -> None:
        vars(self).update(vars(real))
        self._at_step, self._run_folder = at_step, folder

    def _write(self, engine: Engine, progress: Progress, partial: Path, final: Path) -> None:
        is_due = progress.step >= self._at_step
        if is_due and _is_first_time(self._run_folder, "fill_disk"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
        super()._write(engine, progress, partial, final)


def _inject(
    batches: Iterator[CellBatch],
    faults: FaultsConfig,
    first_step: int,
    grad_accum_steps: int,
    folder: RunFolder,
) -> Iterator[CellBatch]:
    actions: dict[str, tuple[int | None, Callable[[], None]]] = {
        "exception": (faults.exception_at_step, _raise),
        "kill": (faults.kill_at_step, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "hang": (faults.hang_at_step, lambda: time.sleep(_LONGEST_HANG_S)),
        "tear_checkpoint": (faults.tear_checkpoint_at_step, lambda: _tear_newest(folder)),
    }
    step = first_step
    while True:
        for name, (at_step, action) in actions.items():
            if at_step == step and _is_first_time(folder, name):
                action()
        is_poisoned = faults.nan_at_step == step and _is_first_time(folder, "nan")
        for _ in range(grad_accum_steps):
            batch = next(batches)
            if is_poisoned:
                target = batch.target_BSG
                genes = target.num_genes if isinstance(target, CellCounts) else target.shape[-1]
                poison = np.full((*batch.mask_BS.shape, genes), np.nan, dtype=np.float32)
                batch = batch._replace(target_BSG=poison)
            yield batch
        step += 1


def _is_first_time(folder: RunFolder, name: str) -> bool:
    """Leave a marker that the fault happened, and tell whether there was none."""
    marker = folder.logs / f"fault_{name}.txt"
    if marker.is_file():
        return False
    write_text_atomically(marker, f"injected by [faults] at {time.time():.3f}\n")
    logger.warning("[faults]: %s now", name)
    return True


def _raise() -> None:
    raise InjectedFaultError("[faults] exception_at_step")


def _tear_newest(folder: RunFolder) -> None:
    newest = max(folder.checkpoints.glob("step_*[0-9]"), default=None)
    if newest is None:
        raise LaunchError(
            "faults.tear_checkpoint_at_step comes before the first checkpoint; let it be above "
            "train.checkpoint_every_steps"
        )
    weights = newest / WEIGHTS_NAME
    with weights.open("r+b") as handle:
        handle.truncate(weights.stat().st_size // 2)
    raise InjectedFaultError(f"[faults] tear_checkpoint_at_step: {weights} was cut in half")
