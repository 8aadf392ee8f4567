"""The mean change over all training perturbations: what perturbations have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_store.schema import ControlCells, PerturbationProfiles
from state.baselines.base import stack_changes
from state.baselines.synthesis import synthesize_cells
from state.metrics.errors import EvaluationError


class PerturbationMeanBaseline:
    """Predict the same change for every perturbation, on each one's own control cells.

    The change is the unweighted mean over the train and validation perturbations. Unlike
    ``cell_mean`` it keeps the spread of cells.
    """

    name = "pert_mean"

    def __init__(self) -> None:
        self._change_G: npt.NDArray[np.float64] | None = None

    def fit(self, train: PerturbationProfiles, val: PerturbationProfiles) -> None:
        """Average the changes of both splits.

        Raises
        ------
        EvaluationError
            If neither split has a perturbation.
        """
        changes_PG = stack_changes(train, val)
        if not len(changes_PG):
            raise EvaluationError(
                "pert_mean needs a train or validation perturbation: widen split.train, or drop "
                "'pert_mean' from evaluate.baselines"
            )
        self._change_G = changes_PG.mean(axis=0)

    def predict_change(self, feature_D: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the mean change, [G], whatever the features."""
        del feature_D
        assert self._change_G is not None, "fit comes before predict"
        return self._change_G

    def predict(
        self,
        perturbation: str,
        feature_D: npt.NDArray[np.float32],
        controls: ControlCells,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Predict one perturbed cell for each control cell; name and features play no part."""
        del perturbation
        return synthesize_cells(self.predict_change(feature_D), controls, rng)
