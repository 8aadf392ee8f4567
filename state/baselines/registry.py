"""Build the baselines that a config names, with its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from state.baselines.base import Baseline
from state.baselines.cell_mean import CellMeanBaseline, ControlMeanBaseline
from state.baselines.low_rank import LowRankBaseline
from state.baselines.nearest import NearestBaseline
from state.baselines.no_change import NoChangeBaseline
from state.baselines.perturbation_mean import PerturbationMeanBaseline
from state.baselines.random_forest import RandomForestBaseline
from state.baselines.ridge import RidgeBaseline
from state.config_evaluate import EvaluateConfig

_BUILDERS: Final[dict[str, Callable[[EvaluateConfig], Baseline]]] = {
    "cell_mean": lambda config: CellMeanBaseline(),
    "control_mean": lambda config: ControlMeanBaseline(),
    "no_change": lambda config: NoChangeBaseline(),
    "pert_mean": lambda config: PerturbationMeanBaseline(),
    "nearest": lambda config: NearestBaseline(config.nearest_neighbors),
    "ridge": lambda config: RidgeBaseline(config.ridge_alphas),
    "low_rank": lambda config: LowRankBaseline(config.low_rank_ranks, config.ridge_alphas),
    "random_forest": lambda config: RandomForestBaseline(
        config.forest_trees, config.forest_leaf_sizes
    ),
}


def build_baseline(name: str, config: EvaluateConfig) -> Baseline:
    """Build a baseline, unfitted."""
    return _BUILDERS[name](config)
