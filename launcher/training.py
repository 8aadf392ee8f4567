"""What a training worker needs of the model it trains: ST's task and SE's both give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from launcher.step_division import StepDivision
from state.config import RunConfig, TrainConfig
from state.config_cluster import FaultsConfig
from state.embed_config import EmbedConfig
from state.embedding.objective import EmbeddingObjective
from state.losses import SetObjective
from state.training.flops import StepFlops
from state.training.loop import BatchSource, NonFiniteError, TrainingError

TrainingConfig: TypeAlias = RunConfig | EmbedConfig


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the others."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Training:
    """Model, loss and data of one worker."""

    objective: SetObjective | EmbeddingObjective
    """On the worker's device."""
    build_source: Callable[[], BatchSource[Any]]
    """Opens the worker's share of the data."""
    build_flops: Callable[[], StepFlops]
    """Counts the arithmetic of the model as it is when this is called."""
    faults: FaultsConfig = FaultsConfig()
    """What is to happen to this worker's checkpoints; its data have theirs in them."""
    explain: Callable[[NonFiniteError], TrainingError] | None = None
    """Adds the data of the step to what is said of a loss that is not finite."""


class TrainingTask(Protocol):
    """What a worker is told; picklable. Everything else is in the run folder."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        ...

    @property
    def run_fingerprint(self) -> str:
        """Digest of all that the weights depend on."""
        ...

    @property
    def division(self) -> StepDivision:
        """Each worker's share of an optimiser step."""
        ...

    def load_config(self) -> TrainingConfig:
        """Read the recipe in the run folder."""
        ...

    def build(self, config: Any, settings: TrainConfig, place: Place) -> Training:
        """Build the untrained model, the same on every worker, and what it learns from."""
        ...
