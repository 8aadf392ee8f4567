"""PDS, ``discrimination_score_l1``: how near a predicted effect lies to its own true effect.

For perturbation p, every true effect q lies at L1 distance d_q from the predicted effect of p, the
gene named p left out; PDS_p = 1 - rank of d_p / P, with 0-based ranks. A prediction that says
nothing about p scores 0.5 + 1 / (2 P) on average. Shape legend: G genes, P perturbations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

FloatArray = npt.NDArray[np.float64]


def compute_discrimination_l1(
    real_effects_PG: FloatArray,
    pred_effects_PG: FloatArray,
    names: Sequence[str],
    genes: Sequence[str],
) -> FloatArray:
    """Compute the discrimination score of each perturbation, [P] in {1/P, ..., 1}.

    Parameters
    ----------
    real_effects_PG, pred_effects_PG
        Mean log1p expression of each perturbation minus that of its own side's control.
    names
        Perturbation names, length P. One that is also a gene is not scored on that gene.
    genes
        Gene names, length G.
    """
    num_perts = len(names)
    column_of = {gene: column for column, gene in enumerate(genes)}
    scores_P = np.empty(num_perts)
    for index, name in enumerate(names):
        weight_G = np.ones(len(genes))
        if name in column_of:
            weight_G[column_of[name]] = 0.0
        distance_P = cdist(
            pred_effects_PG[index : index + 1], real_effects_PG, "cityblock", w=weight_G
        )[0]
        own = distance_P[index]
        # Equal distances rank in the order of the perturbations, so that reruns agree.
        rank = np.sum(distance_P < own) + np.sum(distance_P[:index] == own)
        scores_P[index] = 1.0 - rank / num_perts
    return scores_P
