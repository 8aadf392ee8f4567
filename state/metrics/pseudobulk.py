"""Pseudobulks: the mean log1p expression of each perturbation, and its effect on the control.

Shape legend: N cells, G genes, P perturbations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from numba import njit

from state.metrics.tables import CellGroups

FloatArray = npt.NDArray[np.float64]


def compute_pseudobulks(values: Any, groups: CellGroups) -> FloatArray:
    """Average the cells of each group.

    Parameters
    ----------
    values
        [N, G] log1p expression, CSR or dense.
    groups
        The group of each cell.

    Returns
    -------
    pseudobulks
        [P + 1, G] float64, the control's last.
    """
    sums: FloatArray = np.zeros((len(groups.sizes), int(values.shape[1])))
    if sp.issparse(values):
        _add_csr_rows(values.data, values.indices, values.indptr, groups.codes_N, sums)
    else:
        _add_dense_rows(values, groups.codes_N, sums)
    return np.asarray(sums / groups.sizes[:, None], dtype=np.float64)


def compute_effects(pseudobulks: FloatArray) -> FloatArray:
    """Subtract the control, the last row: [P, G] changes from [P + 1, G] pseudobulks."""
    return np.asarray(pseudobulks[:-1] - pseudobulks[-1])


@njit(cache=True, nogil=True)
def _add_csr_rows(
    data: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    indptr: npt.NDArray[Any],
    codes_N: npt.NDArray[Any],
    sums: npt.NDArray[Any],
) -> None:
    for cell in range(len(codes_N)):
        for entry in range(indptr[cell], indptr[cell + 1]):
            sums[codes_N[cell], indices[entry]] += data[entry]


@njit(cache=True, nogil=True)
def _add_dense_rows(
    values_NG: npt.NDArray[Any], codes_N: npt.NDArray[Any], sums: npt.NDArray[Any]
) -> None:
    for cell in range(len(codes_N)):
        for gene in range(values_NG.shape[1]):
            sums[codes_N[cell], gene] += values_NG[cell, gene]
