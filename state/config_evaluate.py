"""How a run is judged: baselines, how predicted changes become cells, folds and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from state.config_section import Fraction, PositiveFloat, PositiveInt, Section, Seed

BaselineName = Literal[
    "cell_mean",
    "control_mean",
    "no_change",
    "pert_mean",
    "nearest",
    "ridge",
    "low_rank",
    "random_forest",
]


class EvaluateConfig(Section):
    """Which baselines stand beside the model, how all of them predict, and how often."""

    baselines: tuple[BaselineName, ...] = get_args(BaselineName)
    """Rows of the leaderboard beside ``state``. ``cell_mean`` is needed for Overall."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to predict with: lowest validation loss, or the newest."""
    ridge_alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        *(0.1, 1.0, 10.0),
        *(100.0, 1000.0, 10_000.0),
    )
    """Penalties tried for ridge and low-rank regression; cross-validation on train + val
    chooses."""
    low_rank_ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5, 10, 20, 50)
    """Ranks tried for low-rank regression; cross-validation on train + val chooses."""
    nearest_neighbors: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 5, 10, 20)
    """Numbers of nearest perturbations tried; cross-validation on train + val chooses."""
    forest_trees: PositiveInt = 200
    """Trees of the random forest."""
    forest_leaf_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 5)
    """Smallest leaves tried for the random forest; cross-validation on train + val chooses."""
    fdr: Fraction = 0.05
    """A gene is significant below this false discovery rate."""
    own_cells: Literal["auto", "always", "never"] = "auto"
    """The trained model's cells: as it predicts them, drawn from counts with the changes it
    predicts, or whichever is better on the validation split."""
    effect_scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 0.5, 0.25)
    """Factors on predicted changes where cells are drawn from counts; the validation split
    chooses one for each model."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Repeat the run for each fold of a cross-validation over perturbations, in sub-runs that
    share the store, and judge all of them together. Absent: one run, of the ``[split]`` table."""
    beside: tuple[Path, ...] = ()
    """Run folders of finished runs on the same held-out cells: their trained models are judged in
    this leaderboard too. With ``folds`` or ``seeds``, those of the same ones."""
    seeds: tuple[Seed, ...] = ()
    """Repeat the run with each of these seeds (of weights and order; the split stays), in
    sub-runs, and report the spread. Absent: the run's own seed."""

    @model_validator(mode="after")
    def _has_the_reference_row(self) -> EvaluateConfig:
        if "cell_mean" not in self.baselines:
            raise ValueError("baselines must contain 'cell_mean': Overall is scaled against it")
        return self

    @model_validator(mode="after")
    def _repeats_no_seed(self) -> EvaluateConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} names one twice")
        return self

    @property
    def has_repeats(self) -> bool:
        """Whether the run consists of sub-runs."""
        return self.folds is not None or bool(self.seeds)
