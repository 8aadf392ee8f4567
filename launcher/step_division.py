"""Divide the cell sets (ST) or cells (SE) of an optimiser step among workers and micro-batches.

A run keeps the global batch that it was begun with, whatever number of workers goes on with it:
the sampler hands out the same sets in the same order, so the same model is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import LaunchError
from state.config import RunConfig
from state.embed_config import EmbedConfig
from state.training.checkpoint_files import Checkpoint


@dataclass(frozen=True)
class StepDivision:
    """How each worker does its share of a step."""

    micro_batch_size: int
    """Cell sets (ST) or cells (SE) that a worker puts through the model at once."""
    grad_accum_steps: int
    """Micro-batches of each worker per optimiser step."""


def divide_step(
    config: RunConfig | EmbedConfig, begun: Checkpoint | None, *, alone: bool
) -> StepDivision:
    """Return the micro-batches of each worker that make up the run's global batch.

    Parameters
    ----------
    config
        The recipe; ``train`` and ``cluster.num_workers`` give the global batch of a new run.
    begun
        A checkpoint of the run, whose global batch is kept; None for a new run.
    alone
        Whether one process does the work of all workers, with their micro-batches in one.

    Raises
    ------
    LaunchError
        When the workers cannot have equal shares of the global batch.
    """
    settings, num_workers = config.train, config.cluster.num_workers
    sets_per_step = settings.micro_batch_size * settings.grad_accum_steps * num_workers
    if begun is not None:
        sets_per_step = begun.sets_per_step
    world_size = 1 if alone else num_workers
    if sets_per_step % world_size:
        unit = "cells" if isinstance(config, EmbedConfig) else "cell sets"
        allowed = [str(n) for n in range(1, sets_per_step + 1) if sets_per_step % n == 0]
        raise LaunchError(
            f"cluster.num_workers = {num_workers}: this run takes {sets_per_step} {unit} a step, "
            f"which do not divide among {num_workers} workers. Set cluster.num_workers to "
            f"one of {', '.join(allowed)}, or choose another output_dir"
        )
    share = sets_per_step // world_size
    # What is known to fit in memory, or less.
    largest = settings.micro_batch_size * (num_workers if alone else 1)
    micro_batch_size = max(n for n in range(1, min(largest, share) + 1) if share % n == 0)
    return StepDivision(micro_batch_size, share // micro_batch_size)
