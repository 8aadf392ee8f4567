"""Ridge regression from perturbation features to the change of the mean expression.

Shape legend: P perturbations, T to predict, G genes, D feature width, K at most min(P, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import RidgeCV

from state.baselines.regression import (
    ChangeModel,
    FeatureBaseline,
    choose_by_cross_validation,
    number_alike,
)

FloatArray = npt.NDArray[np.float64]


class RidgeChanges:
    """Fit all genes at once; leave-one-out cross-validation chooses their common penalty.

    Parameters
    ----------
    alphas
        Penalties to try.
    """

    def __init__(self, alphas: Sequence[float]) -> None:
        self._model = RidgeCV(alphas=list(alphas))  # a lone alpha in a tuple fails

    def fit(self, features_PD: FloatArray, changes_PG: FloatArray) -> None:
        """Choose the penalty and fit."""
        # Ridge does not change under rotation. In the coordinates of the perturbations' own
        # subspace it needs [G, K] weights instead of [G, D]: D is thousands, K a hundred.
        self._components_KD = np.linalg.svd(features_PD, full_matrices=False)[2]
        self._model.fit(features_PD @ self._components_KD.T, changes_PG)

    def predict(self, features_TD: FloatArray) -> FloatArray:
        """Predict changes, [T, G]."""
        changes = self._model.predict(features_TD @ self._components_KD.T)
        return np.asarray(changes).reshape(len(features_TD), -1)  # sklearn drops a single gene

    @property
    def alpha(self) -> float:
        """The penalty that cross-validation chose."""
        return float(self._model.alpha_)


class RidgeBaseline(FeatureBaseline):
    """Predict the change of the mean linearly from features with ``RidgeChanges``.

    The intercept, which is not penalised, is the mean change over the train and validation
    perturbations. Leave-one-perturbation-out cross-validation on them chooses the penalty; in
    five folds where a perturbation occurs in several contexts.

    Parameters
    ----------
    alphas
        Penalties to try, in units of squared standardised features.
    """

    name = "ridge"

    def __init__(self, alphas: Sequence[float]) -> None:
        super().__init__()
        self._alphas = tuple(alphas)

    def _choose(self, features_PD: FloatArray, changes_PG: FloatArray) -> ChangeModel:
        if number_alike(features_PD).max() + 1 == len(features_PD):
            return RidgeChanges(self._alphas)
        # Leaving out one of several contexts of a perturbation would leave its answer in.
        alpha = choose_by_cross_validation(
            lambda alpha: RidgeChanges((alpha,)), self._alphas, features_PD, changes_PG
        )
        return RidgeChanges((alpha,))

    @property
    def alpha(self) -> float:
        """The penalty that cross-validation chose."""
        assert isinstance(self._model, RidgeChanges), "fit comes before alpha"
        return self._model.alpha
