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

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from numba import njit

from state.metrics.error import compute_pearson
from state.metrics.judged_cells import CellPart, JudgedCells

FloatArray = npt.NDArray[np.float64]
AnyFloatArray = npt.NDArray[Any]
_Block = tuple[AnyFloatArray, FloatArray]
"""Centered cells, and their squared lengths."""

_VALUES_PER_BLOCK: Final = 1 << 24
"""Expression values of a dense block: 64 MB."""
_CONTROL_VALUES: Final = 1 << 26
"""The same of a block of control cells, which stays while all perturbations pass: 256 MB."""
_MOST_CELLS: Final = 4096
_NEARLY_SAME: Final = 1e-4
"""Squared distances below this share of the squared lengths lose too much in single precision."""


def compute_energy_distances(
    cells: JudgedCells, perts: Sequence[int] | None = None, within_control: float | None = None
) -> FloatArray:
    """Compute the energy distance of perturbations to the control.

    Parameters
    ----------
    cells
        One side of a comparison.
    perts
        Numbers of perturbations; None: all.
    within_control
        ``compute_mean_within(cells, control)``, mean d(c, c), if at hand.

    Returns
    -------
    distances
        [len(perts)].
    """
    control = len(cells.names)
    perts = range(control) if perts is None else perts
    if within_control is None:
        within_control = compute_mean_within(cells, control)
    across = np.zeros(len(perts))
    # The control outside: each of its large blocks is read once, not once for each perturbation.
    for cut in _cut_group(cells, control, _CONTROL_VALUES):
        control_AG = _read_dense(*cut)
        center_G = _center(control_AG)
        control_AG = control_AG - center_G
        squared_A = _squared_lengths(control_AG)
        for number, pert in enumerate(perts):
            for other in _cut_group(cells, pert):
                pert_BG = _read_dense(*other) - center_G
                sides = (pert_BG, _squared_lengths(pert_BG)), (control_AG, squared_A)
                across[number] += _sum_distances(*sides)
    sizes = cells.sizes[np.asarray(perts, dtype=np.int64)]
    across /= sizes * cells.sizes[control]
    within = np.array([compute_mean_within(cells, pert) for pert in perts])
    return np.asarray(2 * across - within - within_control)


def correlate_energy_distances(real_P: FloatArray, pred_P: FloatArray) -> float:
    """Correlate (Pearson) the true with the predicted energy distances; NaN if one is constant."""
    return float(compute_pearson(real_P[None], pred_P[None])[0])


def compute_mean_within(cells: JudgedCells, group: int) -> float:
    """Average the distances of all pairs of one group, each cell with itself included."""
    cuts, total = _cut_group(cells, group), 0.0
    center_G = _center(_read_dense(*cuts[0]))
    for number, cut in enumerate(cuts):
        left_AG = _read_dense(*cut) - center_G
        left = (left_AG, _squared_lengths(left_AG))
        total += _sum_distances(left, left)
        for other in cuts[number + 1 :]:
            right_BG = _read_dense(*other) - center_G
            # The blocks below the diagonal repeat those above it.
            total += 2 * _sum_distances(left, (right_BG, _squared_lengths(right_BG)))
    return total / int(cells.sizes[group]) ** 2


def _sum_distances(left: _Block, right: _Block) -> float:
    """Sum the distances of all pairs of two blocks; a block with itself has a diagonal of 0."""
    (left_AG, left_squared_A), (right_BG, right_squared_B) = left, right
    num_same = len(left_AG) if left_AG is right_BG else 0
    products_AB = left_AG @ right_BG.T
    total, is_safe = _sum_roots(products_AB, left_squared_A, right_squared_B, num_same)
    if not is_safe:
        products_AB = left_AG.astype(np.float64) @ right_BG.astype(np.float64).T
        total, _ = _sum_roots(products_AB, left_squared_A, right_squared_B, num_same)
    return float(total)


@njit(cache=True, nogil=True)
def _sum_roots(
    products_AB: AnyFloatArray, left_A: AnyFloatArray, right_B: AnyFloatArray, num_same: int
) -> tuple[float, bool]:
    """Sum sqrt(|a|^2 + |b|^2 - 2 ab); the second value tells whether single precision will do.

    The first ``num_same`` cells of both blocks are the same, each 0 from itself.
    """
    total, is_safe = 0.0, True
    for row in range(products_AB.shape[0]):
        for column in range(products_AB.shape[1]):
            if row == column and row < num_same:
                continue
            lengths = left_A[row] + right_B[column]
            squared = lengths - 2.0 * np.float64(products_AB[row, column])
            is_safe &= squared >= _NEARLY_SAME * lengths
            total += np.sqrt(max(squared, 0.0))
    return total, is_safe


def _center(values_AG: AnyFloatArray) -> npt.NDArray[np.float32]:
    return np.asarray(values_AG.mean(axis=0, dtype=np.float64), dtype=np.float32)


@njit(cache=True, nogil=True)
def _squared_lengths(values_AG: AnyFloatArray) -> FloatArray:
    """Sum squares in float64."""
    lengths_A = np.zeros(values_AG.shape[0])
    for row in range(values_AG.shape[0]):
        for column in range(values_AG.shape[1]):
            value = np.float64(values_AG[row, column])
            lengths_A[row] += value * value
    return lengths_A


def _cut_group(
    cells: JudgedCells, group: int, most_values: int = _VALUES_PER_BLOCK
) -> list[tuple[CellPart, npt.NDArray[np.int64]]]:
    """Cut the cells of a group into blocks, each rows of one part."""
    step = max(1, min(_MOST_CELLS, most_values // len(cells.genes)))
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
