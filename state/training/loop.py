"""The training loop. The same one runs in one process, under spawned gloo ranks and under Ray.

Data come in as an iterator of batches from a given position; everything that can be resumed is
in ``Progress`` and the checkpoint. Random numbers of a step depend on (seed, step, rank) alone,
so a run that was killed and resumed draws the same ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_store.schema import UserError
from state.batch_tensors import TrainBatch, to_device
from state.config import TrainConfig
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress
from state.training.engine import Engine
from state.training.flops import StepFlops, find_peak_tflops
from state.training.monitor import Monitor, Stopwatch
from state.training.profiling import StepProfiler
from state.training.schedule import learning_rate


class TrainingError(UserError):
    """Training that cannot go on, such as a loss that is not finite."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is not finite."""

    step = 0
    """The first such step."""
    ranks: tuple[int, ...] = ()
    """Whose loss it was; all, where the losses were finite and the gradient was not."""
    noted_at = 0
    """The step at which training stopped for it."""
    loss = math.nan
    grad_norm = math.nan
    """Of the step at which training stopped."""


Batch = TypeVar("Batch", bound=TrainBatch)


@dataclass(frozen=True)
class BatchSource(Generic[Batch]):
    """How the loop gets its data; built by the launcher from store, splits and sampler."""

    open_train: Callable[[int], AbstractContextManager[Iterator[Batch]]]
    """Open the endless stream of this rank's micro-batches at a position (sets consumed)."""
    iterate_val: Callable[[], Iterable[tuple[Batch, np.ndarray]]]
    """This rank's validation batches with the weight [B] of each set: 0 for padding sets."""


def train(
    engine: Engine,
    source: BatchSource[Batch],
    checkpoints: CheckpointFolder,
    monitor: Monitor,
    settings: TrainConfig,
    seed: int,
    profiler: StepProfiler,
    flops: StepFlops,
    is_stop_asked: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train to ``max_steps`` from the newest checkpoint, and return where training ended.

    Once ``is_stop_asked`` is true on any rank, all save at the next record and return early.

    Raises
    ------
    TrainingError
        When the loss is not finite; the last checkpoint is from before that step.
    """
    progress = checkpoints.restore(engine)
    best_val_loss = find_best_val_loss(checkpoints, engine)
    monitor.start(progress.step)
    watch = Stopwatch(flops, find_peak(settings, engine))
    first_bad = torch.full((), math.inf, dtype=torch.float64, device=engine.device)

    with saves_finished(checkpoints, engine), source.open_train(progress.sets_consumed) as batches:
        while progress.step < settings.max_steps:
            seed_step(seed, progress.step, engine.rank)
            lr = learning_rate(progress.step, settings)
            profiler.before_step(progress.step + 1)
            losses = train_step(engine, batches, settings.grad_accum_steps, lr, watch)
            profiler.after_step(progress.step + 1)
            progress = advance(progress, settings, engine.world_size)
            first_bad = note_non_finite(first_bad, losses, progress.step)

            is_last, is_leaving = progress.step == settings.max_steps, False
            if progress.step % settings.log_every_steps == 0 or is_last:
                scalars = finite_means(engine, losses, first_bad, progress.step)
                scalars |= {"train/lr": lr, "train/grad_norm": engine.grad_norm}
                monitor.record(progress.step, scalars | watch.read(engine.world_size))
                is_leaving = any(engine.gather_objects(is_stop_asked()))
                checkpoints.settle(engine)

            is_new_best = False
            if progress.step % settings.val_every_steps == 0 or is_last:
                with watch.paused():
                    progress = replace(progress, val_loss=validate(engine, source))
                monitor.record(progress.step, {"val/loss": progress.val_loss})
                is_new_best = progress.val_loss < best_val_loss
                best_val_loss = min(best_val_loss, progress.val_loss)

            is_due = progress.step % settings.checkpoint_every_steps == 0
            if is_due or is_new_best or is_last or is_leaving:
                finite_means(engine, losses, first_bad, progress.step)
                seconds = save_timed(checkpoints, engine, progress, watch)
                monitor.record(progress.step, {"time/checkpoint_s": seconds})
            if is_leaving:
                break
    return progress


def find_best_val_loss(checkpoints: CheckpointFolder, engine: Engine) -> float:
    """Return the lowest validation loss of the checkpoints that rank 0 sees; infinity: none."""
    best = engine.broadcast_object(checkpoints.best() if engine.rank == 0 else None)
    return math.inf if best is None else best.progress.val_loss


def save_timed(
    checkpoints: CheckpointFolder, engine: Engine, progress: Progress, watch: Stopwatch
) -> float:
    """Save a checkpoint (collective) and return for how long training stood still, seconds."""
    started_s = time.perf_counter()
    with watch.paused():
        checkpoints.save(engine, progress)
    return time.perf_counter() - started_s


@contextmanager
def saves_finished(checkpoints: CheckpointFolder, engine: Engine) -> Iterator[None]:
    """Commit the checkpoint under way when training ends, or stops for a NaN on every rank."""
    try:
        yield
    except NonFiniteError:
        checkpoints.finish(engine)
        raise
    except BaseException:
        # The run folder is free for the next command when this one has ended.
        checkpoints.abandon()
        raise
    checkpoints.finish(engine)


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    grad_accum_steps: int,
    lr: float,
    watch: Stopwatch,
) -> Tensor:
    """Run one optimiser step and return this rank's loss and its terms ([1 + K], on the device).

    Nothing here waits for the device.
    """
    losses = []
    for _ in range(grad_accum_steps):
        started_s = time.perf_counter()
        batch = next(batches)
        watch.add_wait(time.perf_counter() - started_s)
        watch.add_batch(batch.sizes_B)
        losses.append(engine.backward(to_device(batch, engine.device)))
        engine.step(lr)
    watch.add_step()
    return torch.stack(losses).mean(0)


def validate(engine: Engine, source: BatchSource[Batch]) -> float:
    """Return the mean loss over the validation sets; the same at any number of ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch, weight_B in source.iterate_val():
        weights = torch.from_numpy(weight_B).to(engine.device, torch.float32)
        loss = engine.evaluate((*to_device(batch, engine.device), weights))
        weight = float(weight_B.sum())
        if weight > 0:
            totals += torch.stack([loss.double() * weight, torch.full_like(totals[1], weight)])
    total, weight = (float(value) for value in engine.sum_over_ranks(totals).tolist())
    return total / weight


def advance(progress: Progress, settings: TrainConfig, world_size: int) -> Progress:
    """Count one optimiser step and the sets that all ranks consumed for it."""
    sets_per_step = settings.micro_batch_size * settings.grad_accum_steps * world_size
    # Of the new weights no validation loss is known.
    return Progress(progress.step + 1, progress.sets_consumed + sets_per_step)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that resuming needs no saved state."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))


def mean_over_ranks(engine: Engine, losses: Tensor) -> dict[str, float]:
    """Fetch the loss and its terms, averaged over the ranks, under the names of the records."""
    means = engine.sum_over_ranks(losses.double()) / engine.world_size
    tags = ["train/loss", *(f"train/{name}" for name in engine.term_names)]
    return dict(zip(tags, means.tolist(), strict=True))


def finite_means(engine: Engine, losses: Tensor, first_bad: Tensor, step: int) -> dict[str, float]:
    """Return ``mean_over_ranks``, unless this step or one before it was not finite (collective).

    Raises
    ------
    NonFiniteError
        As ``refuse_non_finite``.
    """
    means = mean_over_ranks(engine, losses)
    refuse_non_finite(engine, means["train/loss"], first_bad, step)
    return means


def find_peak(settings: TrainConfig, engine: Engine) -> float | None:
    """Return the peak of all workers together, TFLOP/s; None where it is not known."""
    peak = settings.peak_tflops or find_peak_tflops(engine.device, use_bf16=engine.is_bf16)
    return None if peak is None else peak * engine.world_size


def note_non_finite(first_bad: Tensor, losses: Tensor, step: int) -> Tensor:
    """Return the first step whose losses were not finite, infinity so far (scalar, on the device).

    DeepSpeed leaves such a step out without an error, so the next record would not show it.
    """
    is_fine = torch.isfinite(losses).all()
    return torch.minimum(first_bad, torch.where(is_fine, torch.inf, float(step)).to(first_bad))


def refuse_non_finite(engine: Engine, loss: float, first_bad: Tensor, step: int) -> None:
    """Stop rather than train on, or save: weights after a NaN are worth nothing (collective)."""
    firsts = engine.gather_objects(float(first_bad))
    first, grad_norm = min(firsts), engine.grad_norm
    if math.isfinite(loss) and math.isfinite(grad_norm) and math.isinf(first):
        return
    bad_step = int(min(first, step))
    error = NonFiniteError(
        f"at step {bad_step} the loss or its gradient is not finite (step {step}: "
        f"loss {loss:g}, gradient norm {grad_norm:g}). Checkpoints are "
        "only from before it. Look for extreme values in the input, or train with a lower train.lr "
        "in another output_dir (or in this one with --overwrite)"
    )
    error.step, error.noted_at, error.loss, error.grad_norm = bad_step, step, loss, grad_norm
    error.ranks = tuple(rank for rank, at in enumerate(firsts) if at == first)
    raise error
