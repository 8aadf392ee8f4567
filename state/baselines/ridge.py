"""Ridge regression from perturbation features to the change of the mean expression.

Shape legend: N cells, G genes, P perturbations, D feature width, K at most min(P, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from data_store.schema import ControlCells, PerturbationProfiles
from state.baselines.base import stack_changes
from state.baselines.synthesis import synthesize_cells
from state.metrics.errors import EvaluationError


class RidgeBaseline:
    """Predict the change of the mean linearly from features; cells by ``synthesize_cells``.

    The intercept, which is not penalised, is the mean change over the train and validation
    perturbations. Leave-one-perturbation-out cross-validation on them chooses the penalty.

    Parameters
    ----------
    alphas
        Penalties to try, in units of squared standardised features.
    """

    name = "ridge"

    def __init__(self, alphas: Sequence[float]) -> None:
        self._alphas = tuple(alphas)
        self._scaler = StandardScaler()
        self._model: RidgeCV | None = None
        self._components_KD: npt.NDArray[np.float64] | None = None

    def fit(self, train: PerturbationProfiles, val: PerturbationProfiles) -> None:
        """Choose the penalty and fit on the perturbations of both splits.

        Raises
        ------
        EvaluationError
            With fewer than two perturbations: there is none to leave out.
        """
        changes_PG = stack_changes(train, val)
        if len(changes_PG) < 2:
            raise EvaluationError(
                f"ridge needs at least 2 train and validation perturbations, not "
                f"{len(changes_PG)}: widen split.train, or drop 'ridge' from evaluate.baselines"
            )
        features_PD = np.concatenate([train.features_PD, val.features_PD]).astype(np.float64)
        scaled_PD = self._scaler.fit_transform(features_PD)
        # Ridge does not change under rotation. In the coordinates of the perturbations' own
        # subspace it needs [G, K] weights instead of [G, D]: D is thousands, K a hundred.
        self._components_KD = np.linalg.svd(scaled_PD, full_matrices=False)[2]
        self._model = RidgeCV(alphas=list(self._alphas))  # a lone alpha in a tuple fails
        self._model.fit(scaled_PD @ self._components_KD.T, changes_PG)

    @property
    def alpha(self) -> float:
        """The penalty that cross-validation chose."""
        assert self._model is not None, "fit comes before alpha"
        return float(self._model.alpha_)

    def predict_change(self, feature_D: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Predict the change of the mean log1p expression, [G]."""
        assert self._model is not None, "fit comes before predict"
        assert self._components_KD is not None
        scaled_1D = self._scaler.transform(feature_D[None].astype(np.float64))
        change_1G = self._model.predict(scaled_1D @ self._components_KD.T)
        return np.asarray(change_1G).reshape(-1)  # sklearn drops the axis of a single gene

    def predict(
        self,
        perturbation: str,
        feature_D: npt.NDArray[np.float32],
        controls: ControlCells,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Predict one perturbed cell for each control cell; the name plays no part."""
        del perturbation
        return synthesize_cells(self.predict_change(feature_D), controls, rng)
