"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from state.config import TrainConfig


def learning_rate(step: int, settings: TrainConfig) -> float:
    """Return the rate of optimiser step ``step`` (counted from 0).

    Linear warm-up that reaches the peak at ``warmup_steps``, then half a cosine down to
    ``min_lr_ratio`` of the peak at the last step, or constant.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    span = max(1, settings.max_steps - 1 - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)
