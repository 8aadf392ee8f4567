"""``pearson_edistance``: are perturbations that truly lie far from the control predicted so.

e = 2 mean d(x, c) - mean d(x, x) - mean d(c, c) with Euclidean distances between cells x of a
perturbation and control cells c, the zeros of a cell to itself included (a V-statistic). Distances
come block by block, so that no array of cells x cells, nor a dense copy of all cells, is made.

Products are taken in float32, after a group's mean is subtracted (which changes no distance),
everything else in float64: averaged over many pairs, single precision agrees with double to about
1e-7. Where cells nearly coincide it would not, and the block is done again in double.
Shape legend: A and B cells of a block, G genes, P perturbations.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from state.metrics.error import compute_pearson
from state.metrics.judged_cells import CellPart, JudgedCells

FloatArray = npt.NDArray[np.float64]
AnyFloatArray = npt.NDArray[Any]

_VALUES_PER_BLOCK: Final = 1 << 24
"""Expression values of a dense block: 64 MB."""
_MOST_CELLS: Final = 2048
_NEARLY_SAME: Final = 1e-4
"""Squared distances below this share of the squared lengths lose too much in single precision."""


def compute_energy_distances(cells: JudgedCells) -> FloatArray:
    """Compute the energy distance of each perturbation to the control, [P]."""
    within_control = compute_mean_distance(cells, len(cells.names), len(cells.names))
    distances_P = np.empty(len(cells.names))
    for pert in range(len(cells.names)):
        distances_P[pert] = compute_energy_distance(cells, pert, within_control)
    return distances_P


def compute_energy_distance(cells: JudgedCells, pert: int, within_control: float) -> float:
    """Compute the energy distance of one perturbation; ``within_control`` is mean d(c, c)."""
    across = compute_mean_distance(cells, pert, len(cells.names))
    return 2 * across - compute_mean_distance(cells, pert, pert) - within_control


def correlate_energy_distances(real_P: FloatArray, pred_P: FloatArray) -> float:
    """Correlate (Pearson) the true with the predicted energy distances; NaN if one is constant."""
    return float(compute_pearson(real_P[None], pred_P[None])[0])


def compute_mean_distance(cells: JudgedCells, left: int, right: int) -> float:
    """Average the distances of all pairs of two groups, or within one."""
    left_cuts, right_cuts = _cut_group(cells, left), _cut_group(cells, right)
    center_G = _read_dense(*left_cuts[0]).mean(axis=0, dtype=np.float64).astype(np.float32)
    total = 0.0
    for number, cut in enumerate(left_cuts):
        left_AG = _read_dense(*cut) - center_G
        if left == right:
            total += _sum_distances(left_AG, left_AG, is_diagonal=True)
        # Within a group the blocks below the diagonal repeat those above it.
        for other in right_cuts[number + 1 :] if left == right else right_cuts:
            sum_AB = _sum_distances(left_AG, _read_dense(*other) - center_G, is_diagonal=False)
            total += sum_AB * (2 if left == right else 1)
    return total / (int(cells.sizes[left]) * int(cells.sizes[right]))


def _sum_distances(left_AG: AnyFloatArray, right_BG: AnyFloatArray, *, is_diagonal: bool) -> float:
    left_squared_A = _squared_lengths(left_AG)
    right_squared_B = _squared_lengths(right_BG)
    lengths_AB = left_squared_A[:, None] + right_squared_B[None]
    squared_AB = lengths_AB - 2 * (left_AG @ right_BG.T)
    if left_AG.dtype == np.float32:
        is_near_AB = squared_AB < _NEARLY_SAME * lengths_AB
        if is_diagonal:
            np.fill_diagonal(is_near_AB, val=False)
        if is_near_AB.any():
            return _sum_distances(
                left_AG.astype(np.float64), right_BG.astype(np.float64), is_diagonal=is_diagonal
            )
    np.maximum(squared_AB, 0.0, out=squared_AB)
    if is_diagonal:
        np.fill_diagonal(squared_AB, 0.0)
    np.sqrt(squared_AB, out=squared_AB)
    return float(squared_AB.sum())


def _squared_lengths(values_AG: AnyFloatArray) -> FloatArray:
    """Sum squares in float64 without a float64 copy of the block."""
    return np.array([np.dot(row, row) for row in map(np.float64, values_AG)], dtype=np.float64)


def _cut_group(cells: JudgedCells, group: int) -> list[tuple[CellPart, npt.NDArray[np.int64]]]:
    """Cut the cells of a group into blocks, each rows of one part."""
    step = max(1, min(_MOST_CELLS, _VALUES_PER_BLOCK // len(cells.genes)))
    rows_of = [(part, np.flatnonzero(part.codes_N == group)) for part in cells.parts]
    return [
        (part, rows[start : start + step])
        for part, rows in rows_of
        for start in range(0, len(rows), step)
    ]


def _read_dense(part: CellPart, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Read the judged genes of some cells."""
    values: Any = part.source.read_rows(rows)
    dense = values.toarray() if sp.issparse(values) else values
    if not np.array_equal(part.columns_G, np.arange(dense.shape[1])):
        dense = dense[:, part.columns_G]
    return np.asarray(dense, dtype=np.float32)
