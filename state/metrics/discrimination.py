"""PDS, ``discrimination_score_*``: how near a predicted effect lies to its own true effect.

For perturbation p, every true effect q lies at distance d_q from the predicted effect of p, the
gene named p left out; PDS_p = 1 - rank of d_p / P, with 0-based ranks. A prediction that says
nothing about p scores 0.5 + 1 / (2 P) on average. Shape legend: G genes, P perturbations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

FloatArray = npt.NDArray[np.float64]
Distance = Literal["l1", "l2", "cosine"]


def compute_discrimination(
    real_effects_PG: FloatArray,
    pred_effects_PG: FloatArray,
    names: Sequence[str],
    genes: Sequence[str],
    distance: Distance = "l1",
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
    distance
        City block, Euclidean, or 1 - cosine (which is 1 for an effect of length 0).
    """
    column_of = {gene: column for column, gene in enumerate(genes)}
    ranks_P = np.empty(len(names))
    for index, name in enumerate(names):
        kept_G = np.ones(len(genes), dtype=np.bool_)
        if name in column_of:
            kept_G[column_of[name]] = False
        ranks_P[index] = _rank_of_own(
            real_effects_PG[:, kept_G], pred_effects_PG[index, kept_G], index, distance
        )
    return np.asarray(1.0 - ranks_P / len(names))


def compute_discrimination_rank1(
    real_effects_PG: FloatArray, pred_effects_PG: FloatArray
) -> FloatArray:
    """Compute ``pds_cosine_rank1``: cosine, no gene left out, 1-based ranks; [P] in [0, 1 - 1/P].

    Both effects are taken against the real control. No information scores 0.5 - 1 / (2 P).
    """
    num_perts = len(real_effects_PG)
    ranks_P = [
        1 + _rank_of_own(real_effects_PG, pred_effects_PG[index], index, "cosine")
        for index in range(num_perts)
    ]
    return np.asarray(1.0 - np.array(ranks_P) / num_perts)


def compute_distances(
    real_effects_PG: FloatArray, pred_effect_G: FloatArray, distance: Distance
) -> FloatArray:
    """Compute the distance of one predicted effect to every true effect, [P]."""
    pred_1G = pred_effect_G[None]
    if distance == "l1":
        return np.asarray(cdist(pred_1G, real_effects_PG, "cityblock")[0])
    if distance == "l2":
        return np.asarray(cdist(pred_1G, real_effects_PG, "euclidean")[0])
    lengths_P = np.linalg.norm(real_effects_PG, axis=1) * np.linalg.norm(pred_effect_G)
    products_P = real_effects_PG @ pred_effect_G
    cosine_P = np.divide(products_P, lengths_P, out=np.zeros(len(lengths_P)), where=lengths_P > 0)
    return np.asarray(1.0 - cosine_P)


def _rank_of_own(
    real_effects_PG: FloatArray, pred_effect_G: FloatArray, index: int, distance: Distance
) -> int:
    distance_P = compute_distances(real_effects_PG, pred_effect_G, distance)
    own = distance_P[index]
    # Equal distances rank in the order of the perturbations, so that reruns agree.
    return int(np.sum(distance_P < own) + np.sum(distance_P[:index] == own))
