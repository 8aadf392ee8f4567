"""Overall: DES, PDS and MAE, each scaled so that a baseline is 0 and perfection 1, and averaged.

DES' = (DES - DES_b) / (1 - DES_b), PDS' likewise, MAE' = 1 - MAE / MAE_b; NaN counts as 0, and
nothing falls below 0. Overall = 100 x their mean. The scaled values are those of the *averages*
over perturbations, as in the Virtual Cell Challenge. Legend: C cases (models or resamples).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

METRICS = ("des", "pds", "mae")
"""The order of the last axis of scores."""


def scale_scores(scores: npt.ArrayLike, baseline: npt.ArrayLike) -> FloatArray:
    """Scale mean DES, PDS and MAE against a baseline's.

    Parameters
    ----------
    scores, baseline
        [..., 3] in the order of ``METRICS``; they broadcast.

    Returns
    -------
    scaled
        [..., 3] at least 0; 1 is perfect.
    """
    scores, baseline = np.broadcast_arrays(
        np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    )
    scaled = np.empty(scores.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled[..., :2] = (scores[..., :2] - baseline[..., :2]) / (1 - baseline[..., :2])
        scaled[..., 2] = 1 - scores[..., 2] / baseline[..., 2]
    return np.maximum(np.nan_to_num(scaled, nan=0.0, neginf=0.0), 0.0)


def compute_overall(scaled: FloatArray) -> FloatArray:
    """Average scaled scores [..., 3] into Overall [...], from 0 (baseline) to 100."""
    return np.asarray(100 * scaled.mean(axis=-1))
