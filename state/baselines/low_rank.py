"""Linear low-rank model: change = mean + A W p, between gene and perturbation embeddings.

A holds K orthonormal gene embeddings, the leading principal components of the training changes;
p is the perturbation's feature vector, and W is fitted by ridge regression (the linear model of
Ahlmann-Eltze et al. 2025). Shape legend: P perturbations, T to predict, G genes, D feature width,
K rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from state.baselines.regression import ChangeModel, FeatureBaseline, choose_by_cross_validation

FloatArray = npt.NDArray[np.float64]


class LowRankChanges:
    """Regress the K leading components of the changes on the features.

    Parameters
    ----------
    setting
        The rank K and the ridge penalty.
    """

    def __init__(self, setting: tuple[int, float]) -> None:
        self.rank, self.penalty = setting

    def fit(self, features_PD: FloatArray, changes_PG: FloatArray) -> None:
        """Find the gene embeddings and W."""
        self._mean_G = changes_PG.mean(axis=0)
        self._centre_D = features_PD.mean(axis=0)
        centred_PG = changes_PG - self._mean_G
        self._genes_KG = np.linalg.svd(centred_PG, full_matrices=False)[2][: self.rank]
        scores_PK = centred_PG @ self._genes_KG.T
        # The dual form solves a system of P perturbations instead of D features.
        self._features_PD = features_PD - self._centre_D
        gram_PP = self._features_PD @ self._features_PD.T
        gram_PP[np.diag_indices_from(gram_PP)] += self.penalty
        self._weights_PK = np.linalg.solve(gram_PP, scores_PK)

    def predict(self, features_TD: FloatArray) -> FloatArray:
        """Predict changes, [T, G]."""
        similarity_TP = (features_TD - self._centre_D) @ self._features_PD.T
        return np.asarray(self._mean_G + similarity_TP @ self._weights_PK @ self._genes_KG)


class LowRankBaseline(FeatureBaseline):
    """Predict with ``LowRankChanges``; cross-validation chooses rank and penalty.

    Parameters
    ----------
    ranks
        Ranks to try; those above the number of perturbations mean full rank.
    penalties
        Penalties to try, in units of squared standardised features.
    """

    name = "low_rank"

    def __init__(self, ranks: Sequence[int], penalties: Sequence[float]) -> None:
        super().__init__()
        self._settings = tuple(product(ranks, penalties))

    def _choose(self, features_PD: FloatArray, changes_PG: FloatArray) -> ChangeModel:
        chosen = choose_by_cross_validation(LowRankChanges, self._settings, features_PD, changes_PG)
        return LowRankChanges(chosen)
