"""MAE, ``mae``: mean absolute error of the mean expression, over all genes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def compute_mae(real_means_PG: FloatArray, pred_means_PG: FloatArray) -> FloatArray:
    """Compute the error of each perturbation, [P], in units of log1p expression.

    The control takes no part, and the target gene is not left out.
    """
    return np.asarray(np.abs(pred_means_PG - real_means_PG).mean(axis=1))
