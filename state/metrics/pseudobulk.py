"""Effects: how the mean log1p expression of each perturbation differs from the control's.

The means come with the tests: ``DifferentialTable.pseudobulks``. Shape legend: G genes,
P perturbations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def compute_effects(pseudobulks: FloatArray) -> FloatArray:
    """Subtract the control, the last row: [P, G] changes from [P + 1, G] pseudobulks."""
    return np.asarray(pseudobulks[:-1] - pseudobulks[-1])
