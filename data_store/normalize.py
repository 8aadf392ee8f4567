"""Library size, scaling and log1p of raw counts, bit for bit as scanpy does them.

Pure functions on CSR. ``scanpy.pp.normalize_total`` (1.11.5) works in float32: row sums, their
ratio to the target, and the division of each count. Shape legend: N cells, G genes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

# log1p of a count above three million: no normalised cell reaches it, raw counts do.
MAX_LOG1P = 15
NUM_LEVELS = 256
"""Counts below this are looked up in a table of the cell's values: few others occur."""
LEVELS = np.arange(NUM_LEVELS, dtype=np.float32)


def compute_library_size(counts: sp.csr_matrix) -> npt.NDArray[np.float64]:
    """Return the [N] row sums, accumulated in float64."""
    cells = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    sums = np.bincount(cells, weights=counts.data, minlength=counts.shape[0])
    return sums.astype(np.float64, copy=False)


def compute_target_sum(library_size: npt.NDArray[np.float64]) -> float:
    """Return the median library size, cells without counts included, as float32 gives it."""
    return float(np.median(library_size.astype(np.float32)))


def compute_size_factors(
    library_size: npt.NDArray[np.float64], target_sum: float
) -> npt.NDArray[np.float32]:
    """Return the [N] divisors that scale every cell to ``target_sum``; 1 for an empty cell."""
    factors = library_size.astype(np.float32) / np.float32(target_sum)
    factors[factors == 0] = 1
    return factors


def normalize_log1p(counts: sp.csr_matrix, size_factors: npt.NDArray[np.float32]) -> sp.csr_matrix:
    """Divide each row of float32 counts by its factor and take log(1 + x); float32 CSR."""
    divisors = np.repeat(size_factors, np.diff(counts.indptr))
    values = np.log1p(counts.data / divisors)
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def tabulate_log1p(size_factors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return what ``normalize_log1p`` makes of small counts, [N, ``NUM_LEVELS``].

    Counts repeat, so that looking them up is much cheaper than a logarithm for each.
    """
    table: npt.NDArray[np.float32] = np.log1p(LEVELS / size_factors[:, None])
    return table


def look_up_log1p(
    counts: npt.NDArray[Any],
    indptr: npt.NDArray[np.int64],
    size_factors: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Return what ``normalize_log1p`` makes of the counts of CSR rows, the same bits.

    Parameters
    ----------
    counts
        [nnz] counts, unsigned or whole float32.
    indptr
        [N + 1] where each row begins.
    size_factors
        [N] divisors.
    """
    if counts.size < NUM_LEVELS * size_factors.size:
        normalized: npt.NDArray[np.float32] = counts.astype(np.float32)
        normalized /= np.repeat(size_factors, np.diff(indptr))
        return np.log1p(normalized)
    table = tabulate_log1p(size_factors)
    values = np.empty(counts.size, dtype=np.float32)
    if _fill_values(counts, indptr, table, values):
        large = np.flatnonzero(counts >= NUM_LEVELS)
        rows = np.searchsorted(indptr, large, side="right") - 1
        values[large] = np.log1p(counts[large].astype(np.float32) / size_factors[rows])
    return values


def return_from_log1p(normalized: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Take log1p of normalised counts and bring them back, with the rounding of both."""
    values: npt.NDArray[np.float32] = np.expm1(np.log1p(normalized))
    return values


@numba.njit(cache=True, nogil=True)
def _fill_values(
    counts: npt.NDArray[Any],
    indptr: npt.NDArray[np.int64],
    table: npt.NDArray[np.float32],
    values: npt.NDArray[np.float32],
) -> int:
    """Look up the small counts, and return how many are not."""
    num_large = 0
    # Unsigned numbers index without a test for negative ones.
    last = np.uint32(table.shape[1] - 1)
    for row in range(indptr.size - 1):
        levels = table[row]
        row_counts = counts[indptr[row] : indptr[row + 1]]
        out = values[indptr[row] : indptr[row + 1]]
        for entry in range(row_counts.size):
            count = np.uint32(row_counts[entry])
            num_large += int(count > last)
            out[entry] = levels[min(count, last)]
    return num_large
