"""Sums of expression over groups of cells, gathered block by block.

Shape legend: n cells of a block, G genes, P groups, K groups that occur in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp


@dataclass(frozen=True)
class BlockGroupSums:
    """Sums over the cells of each group in one block: small, because blocks hold few groups."""

    groups_K: npt.NDArray[np.int64]
    """Groups that occur, ascending."""
    num_cells_K: npt.NDArray[np.int64]
    """Cells of each."""
    sum_KG: npt.NDArray[np.float64]
    """Sums of their values."""


class GroupSums:
    """Sums over the cells of each of P groups seen so far.

    Parameters
    ----------
    num_groups, num_genes
        P and G.
    """

    def __init__(self, num_groups: int, num_genes: int) -> None:
        self.num_cells_P = np.zeros(num_groups, dtype=np.int64)
        self.sum_PG = np.zeros((num_groups, num_genes))

    def add(self, part: BlockGroupSums) -> None:
        """Add the cells of a block."""
        self.num_cells_P[part.groups_K] += part.num_cells_K
        self.sum_PG[part.groups_K] += part.sum_KG

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the [P, G] means; every group must have a cell."""
        means: npt.NDArray[np.float64] = self.sum_PG / self.num_cells_P[:, None]
        return means


def sum_groups(values: sp.csr_matrix, group_n: npt.NDArray[np.int64]) -> BlockGroupSums:
    """Sum the rows of a [n, G] float32 CSR block by group, in float64."""
    groups_K, place_n, num_cells_K = np.unique(group_n, return_inverse=True, return_counts=True)
    sum_KG = np.zeros((groups_K.size, values.shape[1]))
    _accumulate(values.data, values.indices, values.indptr, place_n, sum_KG)
    return BlockGroupSums(groups_K, num_cells_K, sum_KG)


@numba.njit(cache=True, nogil=True)
def _accumulate(
    data: npt.NDArray[np.float32],
    indices: npt.NDArray[np.int32],
    indptr: npt.NDArray[np.int32],
    place_n: npt.NDArray[np.int64],
    sum_KG: npt.NDArray[np.float64],
) -> None:
    for cell in range(place_n.size):
        for position in range(indptr[cell], indptr[cell + 1]):
            sum_KG[place_n[cell], indices[position]] += data[position]
