"""MAE and its relatives: errors of the mean expression, and the correlation of its change.

Shape legend: G genes, P perturbations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def compute_mae(real_PG: FloatArray, pred_PG: FloatArray) -> FloatArray:
    """Compute the mean absolute error of each perturbation over all genes, [P].

    ``mae`` compares pseudobulks in units of log1p expression: the control takes no part, and the
    target gene is not left out. ``mae_delta`` compares effects.
    """
    return np.asarray(np.abs(pred_PG - real_PG).mean(axis=1))


def compute_mse(real_PG: FloatArray, pred_PG: FloatArray) -> FloatArray:
    """Compute the mean squared error of each perturbation over all genes, [P]."""
    return np.asarray(np.square(pred_PG - real_PG).mean(axis=1))


def compute_mae_top(
    real_PG: FloatArray, pred_PG: FloatArray, real_effects_PG: FloatArray, num_genes: int
) -> FloatArray:
    """Compute the error on the genes that truly change most, [P].

    Of equally large changes, genes that come first are taken.
    """
    top_PK = np.argsort(-np.abs(real_effects_PG), axis=1, kind="stable")[:, :num_genes]
    errors_PG = np.abs(pred_PG - real_PG)
    return np.asarray(np.take_along_axis(errors_PG, top_PK, axis=1).mean(axis=1))


def compute_pearson(left_PG: FloatArray, right_PG: FloatArray) -> FloatArray:
    """Correlate two arrays row by row, [P]; NaN where a row is constant."""
    left_PG = left_PG - left_PG.mean(axis=1, keepdims=True)
    right_PG = right_PG - right_PG.mean(axis=1, keepdims=True)
    size_P = np.linalg.norm(left_PG, axis=1) * np.linalg.norm(right_PG, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation_P = (left_PG * right_PG).sum(axis=1) / size_P
    return np.asarray(np.clip(correlation_P, -1.0, 1.0))
