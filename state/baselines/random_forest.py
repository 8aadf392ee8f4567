"""Random forest from perturbation features to the change of the mean expression.

Shape legend: P perturbations, T to predict, G genes, D feature width, K at most P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import RandomForestRegressor

from state.baselines.regression import ChangeModel, FeatureBaseline, choose_by_cross_validation

FloatArray = npt.NDArray[np.float64]

_SEED: Final = 0
_TREES_TO_CHOOSE: Final = 50
"""Trees while leaf sizes are compared; the final forest has as many as the config says."""


class ForestChanges:
    """Fit one forest to all genes.

    Parameters
    ----------
    num_trees
        Trees of the forest.
    min_samples_leaf
        Fewest perturbations in a leaf.
    """

    def __init__(self, num_trees: int, min_samples_leaf: int) -> None:
        self._forest = RandomForestRegressor(
            n_estimators=num_trees,
            min_samples_leaf=min_samples_leaf,
            max_features="sqrt",
            random_state=_SEED,
        )

    def fit(self, features_PD: FloatArray, changes_PG: FloatArray) -> None:
        """Grow the trees."""
        self._mean_G = changes_PG.mean(axis=0)
        centred_PG = changes_PG - self._mean_G
        # Splits minimise squared error over all outputs, which no rotation changes: in the
        # perturbations' own subspace the same trees need K outputs instead of thousands of genes.
        self._basis_KG = np.linalg.svd(centred_PG, full_matrices=False)[2]
        self._forest.fit(features_PD, centred_PG @ self._basis_KG.T)

    def predict(self, features_TD: FloatArray) -> FloatArray:
        """Average the trees, [T, G]."""
        scores_TK = self._forest.predict(features_TD).reshape(len(features_TD), -1)
        return np.asarray(self._mean_G + scores_TK @ self._basis_KG)


class RandomForestBaseline(FeatureBaseline):
    """Predict with ``ForestChanges``; cross-validation chooses the size of leaves.

    Parameters
    ----------
    num_trees
        Trees of the forest that predicts.
    leaf_sizes
        Fewest perturbations in a leaf, to try.
    """

    name = "random_forest"

    def __init__(self, num_trees: int, leaf_sizes: Sequence[int]) -> None:
        super().__init__()
        self._num_trees = num_trees
        self._leaf_sizes = tuple(leaf_sizes)

    def _choose(self, features_PD: FloatArray, changes_PG: FloatArray) -> ChangeModel:
        chosen = choose_by_cross_validation(
            lambda leaf_size: ForestChanges(min(_TREES_TO_CHOOSE, self._num_trees), leaf_size),
            self._leaf_sizes,
            features_PD,
            changes_PG,
        )
        return ForestChanges(self._num_trees, chosen)
