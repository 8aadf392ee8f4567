"""k-nearest perturbations: the mean change of those with the most similar features.

Shape legend: P perturbations, T to predict, G genes, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from state.baselines.regression import ChangeModel, FeatureBaseline, choose_by_cross_validation

FloatArray = npt.NDArray[np.float64]


class NearestChanges:
    """Average the changes of the k perturbations with the largest cosine similarity."""

    def __init__(self, num_neighbors: int) -> None:
        self.num_neighbors = num_neighbors

    def fit(self, features_PD: FloatArray, changes_PG: FloatArray) -> None:
        """Remember all perturbations."""
        self._directions_PD = _normalize(features_PD)
        self._changes_PG = changes_PG

    def predict(self, features_TD: FloatArray) -> FloatArray:
        """Average over the nearest; of equally near perturbations the first are taken."""
        similarity_TP = _normalize(features_TD) @ self._directions_PD.T
        nearest_TK = np.argsort(-similarity_TP, axis=1, kind="stable")[:, : self.num_neighbors]
        return np.asarray(self._changes_PG[nearest_TK].mean(axis=1))


class NearestBaseline(FeatureBaseline):
    """Predict with ``NearestChanges``; cross-validation chooses k.

    Parameters
    ----------
    neighbors
        Numbers of neighbours to try; those above the number of perturbations mean all of them.
    """

    name = "nearest"

    def __init__(self, neighbors: Sequence[int]) -> None:
        super().__init__()
        self._neighbors = tuple(neighbors)

    def _choose(self, features_PD: FloatArray, changes_PG: FloatArray) -> ChangeModel:
        chosen = choose_by_cross_validation(
            NearestChanges, self._neighbors, features_PD, changes_PG
        )
        return NearestChanges(chosen)


def _normalize(features_PD: FloatArray) -> FloatArray:
    length_P1 = np.linalg.norm(features_PD, axis=1, keepdims=True)
    return np.asarray(features_PD / np.where(length_P1 > 0, length_P1, 1.0))
