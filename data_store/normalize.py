"""Library size, scaling and log1p of raw counts, bit for bit as scanpy does them, and the inverse.

Pure functions on CSR. ``scanpy.pp.normalize_total`` (1.11.5) works in float32: row sums, their
ratio to the target, and the division of each count. Shape legend: N cells, G genes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

# log1p of a count above three million: no normalised cell reaches it, raw counts do.
MAX_LOG1P = 15


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


def expm1(values: sp.csr_matrix) -> sp.csr_matrix:
    """Undo the log1p: normalised counts again, float32 CSR."""
    return sp.csr_matrix((np.expm1(values.data), values.indices, values.indptr), shape=values.shape)


def denormalize(values: sp.csr_matrix, size_factors: npt.NDArray[np.float32]) -> sp.csr_matrix:
    """Undo ``normalize_log1p``: raw counts again, within float32 rounding."""
    normalized = expm1(values)
    normalized.data *= np.repeat(size_factors, np.diff(values.indptr))
    return normalized
