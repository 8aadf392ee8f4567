"""Per-gene moments and extremes that are gathered block by block and merged.

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

    @staticmethod
    def zeros(num_genes: int) -> GeneMoments:
        """Return the moments of no cells, the neutral element of ``merge``."""
        return GeneMoments(
            num_cells=0,
            nnz_G=np.zeros(num_genes, dtype=np.int64),
            sum_G=np.zeros(num_genes),
            sum_sq_G=np.zeros(num_genes),
        )

    @staticmethod
    def from_csr(values: sp.csr_matrix) -> GeneMoments:
        """Gather the moments of a [N, G] float32 CSR block without duplicates."""
        num_cells, num_genes = values.shape
        moments = GeneMoments.zeros(num_genes)
        _add_up(values.data, values.indices, moments.nnz_G, moments.sum_G, moments.sum_sq_G)
        return replace(moments, num_cells=num_cells)

    def merge(self, other: GeneMoments) -> GeneMoments:
        """Return the moments of both sets of cells together."""
        return GeneMoments(
            num_cells=self.num_cells + other.num_cells,
            nnz_G=self.nnz_G + other.nnz_G,
            sum_G=self.sum_G + other.sum_G,
            sum_sq_G=self.sum_sq_G + other.sum_sq_G,
        )

    def select(self, is_wanted_G: npt.NDArray[np.bool_]) -> GeneMoments:
        """Return the moments of some of the genes."""
        return GeneMoments(
            num_cells=self.num_cells,
            nnz_G=self.nnz_G[is_wanted_G],
            sum_G=self.sum_G[is_wanted_G],
            sum_sq_G=self.sum_sq_G[is_wanted_G],
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


@dataclass(frozen=True)
class GeneExtremes:
    """Smallest and largest value of each gene over the cells seen so far, zeros included."""

    min_G: npt.NDArray[np.float64]
    """Infinity before the first cell."""
    max_G: npt.NDArray[np.float64]
    """Minus infinity before the first cell."""

    @staticmethod
    def none(num_genes: int) -> GeneExtremes:
        """Return the extremes of no cells, the neutral element of ``merge``."""
        return GeneExtremes(np.full(num_genes, np.inf), np.full(num_genes, -np.inf))

    @staticmethod
    def from_csr(values: sp.csr_matrix) -> GeneExtremes:
        """Find the extremes of a [N, G] CSR block without duplicates."""
        num_cells, num_genes = values.shape
        extremes, num_stored_G = GeneExtremes.none(num_genes), np.zeros(num_genes, dtype=np.int64)
        _widen(values.data, values.indices, num_stored_G, extremes.min_G, extremes.max_G)
        # A cell without a value has a zero.
        zero_G = np.where(num_stored_G < num_cells, 0.0, np.nan)
        return GeneExtremes(np.fmin(extremes.min_G, zero_G), np.fmax(extremes.max_G, zero_G))

    def merge(self, other: GeneExtremes) -> GeneExtremes:
        """Return the extremes of both sets of cells together."""
        return GeneExtremes(
            np.minimum(self.min_G, other.min_G), np.maximum(self.max_G, other.max_G)
        )


@numba.njit(cache=True, nogil=True)
def _add_up(
    data: npt.NDArray[np.float32],
    indices: npt.NDArray[Any],
    nnz_G: npt.NDArray[np.int64],
    sum_G: npt.NDArray[np.float64],
    sum_sq_G: npt.NDArray[np.float64],
) -> None:
    for position in range(data.size):
        value = data[position]
        gene = np.uint32(indices[position])
        nnz_G[gene] += value != 0
        sum_G[gene] += value
        sum_sq_G[gene] += value * value


@numba.njit(cache=True, nogil=True)
def _widen(
    data: npt.NDArray[np.float32],
    indices: npt.NDArray[Any],
    num_stored_G: npt.NDArray[np.int64],
    min_G: npt.NDArray[np.float64],
    max_G: npt.NDArray[np.float64],
) -> None:
    for position in range(data.size):
        value = data[position]
        gene = np.uint32(indices[position])
        num_stored_G[gene] += 1
        min_G[gene] = min(min_G[gene], value)
        max_G[gene] = max(max_G[gene], value)
