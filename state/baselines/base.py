"""What every baseline can do: learn from pseudobulks, predict cells.

Shape legend: N cells, G genes, P perturbations, D feature width.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from data_store.schema import ControlCells, PerturbationProfiles


class Baseline(Protocol):
    """A model fitted on pseudobulks of the train and validation perturbations."""

    @property
    def name(self) -> str:
        """The model's row in the leaderboard."""
        ...

    def fit(self, train: PerturbationProfiles, val: PerturbationProfiles) -> None:
        """Learn from the train and validation splits; the test split is never seen."""
        ...

    def predict(
        self,
        perturbation: str,
        feature_D: npt.NDArray[np.float32],
        controls: ControlCells,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Predict one perturbed cell for each control cell: [N, G] log1p expression, at least 0.

        ``fit`` comes first. Equal generators give equal cells.
        """
        ...


@runtime_checkable
class ChangeBaseline(Baseline, Protocol):
    """A baseline whose cells come from a predicted change of the mean by ``synthesize_cells``."""

    def predict_change(self, feature_D: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Predict the change of the mean log1p expression, [G]."""
        ...


def stack_changes(
    train: PerturbationProfiles, val: PerturbationProfiles
) -> npt.NDArray[np.float64]:
    """Change of the mean expression of each perturbation, [P, G], train first.

    Each perturbation is compared with controls of its own contexts and batches.
    """
    return np.concatenate([split.mean_PG - split.matched_control_PG for split in (train, val)])
