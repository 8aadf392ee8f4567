"""``pearson_edistance``: are perturbations that truly lie far from the control predicted so.

e = 2 mean d(x, c) - mean d(x, x) - mean d(c, c) with Euclidean distances between cells x of a
perturbation and control cells c, the zeros of a cell to itself included (a V-statistic). Distances
come block by block, so that no array of cells x cells, nor a dense copy of all cells, is made.
Shape legend: N cells, A and B cells of a block, G genes, P perturbations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from state.metrics.error import compute_pearson
from state.metrics.tables import CellGroups

FloatArray = npt.NDArray[np.float64]

_VALUES_PER_BLOCK: Final = 1 << 24
"""Expression values of a dense block: 128 MB."""
_MOST_CELLS: Final = 2048


def compute_energy_distances(values: Any, groups: CellGroups) -> FloatArray:
    """Compute the energy distance of each perturbation to the control, [P].

    Parameters
    ----------
    values
        [N, G] log1p expression, CSR or dense.
    groups
        The group of each cell.
    """
    num_perts = len(groups.names)
    order_N = np.argsort(groups.codes_N, kind="stable")
    rows_of = np.split(order_N, np.cumsum(groups.sizes)[:-1])
    control_rows = rows_of[num_perts]
    within_control = _mean_distance(values, control_rows, control_rows)
    distances_P = np.empty(num_perts)
    for index, rows in enumerate(rows_of[:num_perts]):
        across = _mean_distance(values, rows, control_rows)
        distances_P[index] = 2 * across - _mean_distance(values, rows, rows) - within_control
    return distances_P


def correlate_energy_distances(real_P: FloatArray, pred_P: FloatArray) -> float:
    """Correlate (Pearson) the true with the predicted energy distances; NaN if one is constant."""
    return float(compute_pearson(real_P[None], pred_P[None])[0])


def _mean_distance(values: Any, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> float:
    """Average the distances of all pairs; ``right is left`` averages within one group."""
    within = right is left
    total = 0.0
    for left_start, left_AG in _dense_blocks(values, left):
        left_squared_A = np.einsum("ag,ag->a", left_AG, left_AG)
        for right_start, right_BG in _dense_blocks(values, right):
            if within and right_start < left_start:
                continue
            right_squared_B = np.einsum("bg,bg->b", right_BG, right_BG)
            squared_AB = left_AG @ right_BG.T
            squared_AB *= -2
            squared_AB += left_squared_A[:, None]
            squared_AB += right_squared_B[None]
            np.maximum(squared_AB, 0.0, out=squared_AB)
            if within and right_start == left_start:
                np.fill_diagonal(squared_AB, 0.0)
            np.sqrt(squared_AB, out=squared_AB)
            # Within a group the blocks below the diagonal repeat those above it.
            total += float(squared_AB.sum()) * (2 if within and right_start > left_start else 1)
    return total / (len(left) * len(right))


def _dense_blocks(values: Any, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, FloatArray]]:
    step = max(1, min(_MOST_CELLS, _VALUES_PER_BLOCK // int(values.shape[1])))
    for start in range(0, len(rows), step):
        block = values[rows[start : start + step]]
        dense = block.toarray() if sp.issparse(block) else block
        yield start, np.asarray(dense, dtype=np.float64)
