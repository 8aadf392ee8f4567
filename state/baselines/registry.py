"""Build the baselines that a config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from state.baselines.base import Baseline
from state.baselines.cell_mean import CellMeanBaseline
from state.baselines.no_change import NoChangeBaseline
from state.baselines.ridge import RidgeBaseline
from state.config import EvaluateConfig

_BUILDERS: Final[dict[str, Callable[[EvaluateConfig], Baseline]]] = {
    "cell_mean": lambda config: CellMeanBaseline(),
    "no_change": lambda config: NoChangeBaseline(),
    "ridge": lambda config: RidgeBaseline(config.ridge_alphas),
}


def build_baselines(config: EvaluateConfig) -> list[Baseline]:
    """Build the baselines of ``config.baselines``, unfitted, in that order."""
    return [_BUILDERS[name](config) for name in config.baselines]
