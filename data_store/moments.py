"""Per-gene moments that are gathered block by block and merged: sums, squares, extremes.

The sums follow scanpy 1.11.5: float64 accumulators over float32 values, each square a float32
product, so that the genes selected from them are scanpy's. Shape legend: N cells, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp


@dataclass(frozen=True)
class GeneMoments:
    """Moments of each gene over the cells seen so far."""

    num_cells: int
    """Cells seen."""
    nnz_G: npt.NDArray[np.int64]
    """Cells in which the gene is not zero."""
    sum_G: npt.NDArray[np.float64]
    """Sum over cells."""
    sum_sq_G: npt.NDArray[np.float64]
    """Sum of squares over cells."""
    min_G: npt.NDArray[np.float64]
    """Smallest value, zeros included; infinity before the first cell."""
    max_G: npt.NDArray[np.float64]
    """Largest value, zeros included; minus infinity before the first cell."""

    @staticmethod
    def zeros(num_genes: int) -> GeneMoments:
        """Return the moments of no cells, the neutral element of ``merge``."""
        return GeneMoments(
            num_cells=0,
            nnz_G=np.zeros(num_genes, dtype=np.int64),
            sum_G=np.zeros(num_genes),
            sum_sq_G=np.zeros(num_genes),
            min_G=np.full(num_genes, np.inf),
            max_G=np.full(num_genes, -np.inf),
        )

    @staticmethod
    def from_csr(values: sp.csr_matrix) -> GeneMoments:
        """Gather the moments of a [N, G] float32 CSR block without duplicates."""
        num_cells, num_genes = values.shape
        moments = GeneMoments.zeros(num_genes)
        _accumulate(
            values.data,
            values.indices,
            moments.nnz_G,
            moments.sum_G,
            moments.sum_sq_G,
            moments.min_G,
            moments.max_G,
        )
        # A cell without a value has a zero.
        has_zero = moments.nnz_G < num_cells
        return replace(
            moments,
            num_cells=num_cells,
            min_G=np.where(has_zero, np.minimum(moments.min_G, 0), moments.min_G),
            max_G=np.where(has_zero, np.maximum(moments.max_G, 0), moments.max_G),
        )

    def merge(self, other: GeneMoments) -> GeneMoments:
        """Return the moments of both sets of cells together."""
        return GeneMoments(
            num_cells=self.num_cells + other.num_cells,
            nnz_G=self.nnz_G + other.nnz_G,
            sum_G=self.sum_G + other.sum_G,
            sum_sq_G=self.sum_sq_G + other.sum_sq_G,
            min_G=np.minimum(self.min_G, other.min_G),
            max_G=np.maximum(self.max_G, other.max_G),
        )

    def select(self, is_wanted_G: npt.NDArray[np.bool_]) -> GeneMoments:
        """Return the moments of some of the genes."""
        return GeneMoments(
            num_cells=self.num_cells,
            nnz_G=self.nnz_G[is_wanted_G],
            sum_G=self.sum_G[is_wanted_G],
            sum_sq_G=self.sum_sq_G[is_wanted_G],
            min_G=self.min_G[is_wanted_G],
            max_G=self.max_G[is_wanted_G],
        )

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the [G] means."""
        return self.sum_G / self.num_cells

    def variance(self) -> npt.NDArray[np.float64]:
        """Return the [G] unbiased variances (n - 1); the biased one for a single cell."""
        variance = self.sum_sq_G / self.num_cells - self.mean() ** 2
        if self.num_cells > 1:
            variance *= self.num_cells / (self.num_cells - 1)
        return variance


@numba.njit(cache=True, nogil=True)
def _accumulate(
    data: npt.NDArray[np.float32],
    indices: npt.NDArray[Any],
    nnz_G: npt.NDArray[np.int64],
    sum_G: npt.NDArray[np.float64],
    sum_sq_G: npt.NDArray[np.float64],
    min_G: npt.NDArray[np.float64],
    max_G: npt.NDArray[np.float64],
) -> None:
    for position in range(data.size):
        value = data[position]
        gene = np.uint32(indices[position])
        nnz_G[gene] += value != 0
        sum_G[gene] += value
        sum_sq_G[gene] += value * value
        min_G[gene] = min(min_G[gene], value)
        max_G[gene] = max(max_G[gene], value)
