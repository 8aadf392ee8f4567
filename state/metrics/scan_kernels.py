"""Compiled loops that look over a block of expression: non-zeros by gene, range, fractions.

Each adds the non-zeros of control cells and of all others to ``nonzero_2G`` and returns (least
value, largest value, all finite, any fraction). Called by ``judged_cells``. Legend: n cells and C
columns of a block, G genes asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]
Found = tuple[float, float, bool, bool]

_FRACTION = np.float32(1e-3)
"""A value this far above a whole number is no count."""


@njit(cache=True, nogil=True)
def _range_of(values: Array) -> Found:
    lowest, highest = np.float32(np.inf), np.float32(-np.inf)
    is_finite, has_fraction = True, False
    for value in values:
        lowest, highest = min(lowest, value), max(highest, value)
        # NaN - NaN and inf - inf are NaN, which equals nothing.
        is_finite &= value - value == np.float32(0)
    for value in values:
        if value - np.floor(value) > _FRACTION:
            has_fraction = True
            break
    return float(lowest), float(highest), is_finite, has_fraction


@njit(cache=True, nogil=True)
def scan_csr(
    values: Array,
    indices: Array,
    indptr: Array,
    classes_n: Array,
    places_C: Array,
    nonzero_2G: Array,
) -> Found:
    """Look over CSR rows; ``classes_n`` is 1 for control cells and 0 for others."""
    for cell in range(len(classes_n)):
        counts_G = nonzero_2G[classes_n[cell]]
        for entry in range(indptr[cell], indptr[cell + 1]):
            place = places_C[indices[entry]]
            if place >= 0 and values[entry] != 0:
                counts_G[place] += 1
    return _range_of(values)


@njit(cache=True, nogil=True)
def scan_csc(
    values: Array,
    indices: Array,
    indptr: Array,
    classes_n: Array,
    places_C: Array,
    nonzero_2G: Array,
) -> Found:
    """Look over CSC columns; see ``scan_csr``."""
    for column in range(len(places_C)):
        place = places_C[column]
        if place < 0:
            continue
        for entry in range(indptr[column], indptr[column + 1]):
            if values[entry] != 0:
                nonzero_2G[classes_n[indices[entry]], place] += 1
    return _range_of(values)


@njit(cache=True, nogil=True)
def scan_dense(values_nC: Array, classes_n: Array, places_C: Array, nonzero_2G: Array) -> Found:
    """Look over dense rows; see ``scan_csr``."""
    lowest, highest, is_finite, has_fraction = np.inf, -np.inf, True, False
    for cell in range(len(classes_n)):
        counts_G = nonzero_2G[classes_n[cell]]
        for column in range(len(places_C)):
            if places_C[column] >= 0 and values_nC[cell, column] != 0:
                counts_G[places_C[column]] += 1
        found = _range_of(values_nC[cell])
        lowest, highest = min(lowest, found[0]), max(highest, found[1])
        is_finite, has_fraction = is_finite and found[2], has_fraction or found[3]
    return lowest, highest, is_finite, has_fraction
