"""Deal the rows of a plain CSR matrix of counts in one pass from file to store order.

Nearly every h5ad is plain: CSR, genes ascending in each row, whole counts above 0, none above
65,535. A stretch that is not is left to the general way in ``data_store.deal``, which mends it or
says what is wrong. Held to that way by ``tests/unit/data_store/test_deal_plain.py``.
"""

from __future__ import annotations

import threading
from typing import Any

import h5py
import numba
import numpy as np
import numpy.typing as npt

from data_store.deal_file import Pieces, smallest_gene_dtype
from data_store.ingest import SourceFile, open_matrix, read_bounds, spans, widest_gap

Array = npt.NDArray[Any]

# Values and indices of so many elements stay in the cache until they are copied.
_ELEMENTS_AT_ONCE = 1 << 20
# A compressed chunk that two reads share is decoded twice.
_CHUNKS_AT_ONCE = 4
_LARGEST_COUNT = int(np.iinfo(np.uint16).max)


def take_plain_rows(
    file: SourceFile, rows: npt.NDArray[np.int64], place: npt.NDArray[np.int64]
) -> tuple[Pieces, npt.NDArray[np.float64]] | None:
    """Read rows of counts, sorted by their place in the store.

    Parameters
    ----------
    file
        The matrix.
    rows
        [n] rows of it, ascending, at least one.
    place
        [n] row of the store of each.

    Returns
    -------
    The rows and the [n] sums of their counts in the same order; None where the matrix or these
    rows are not plain. Genes and values lie in memory that the thread's next call uses again.

    Raises
    ------
    StoreError
        If the matrix cannot be read, or the row bounds do not fit.
    """
    if file.layout != "csr" or file.gene_map is not None:
        return None
    with open_matrix(file) as group:
        if not _has_plain_types(group):
            return None
        bounds = read_bounds(group, file, rows)
        local = rows - rows[0]
        begin, end = bounds[local], bounds[local + 1]
        order = np.argsort(place)
        indptr = np.concatenate([[0], np.cumsum((end - begin)[order])]).astype(np.int64)
        target = np.empty(rows.size, dtype=np.int64)
        target[order] = indptr[:-1]
        genes = _scratch.take("genes", indptr[-1], smallest_gene_dtype(file.num_genes))
        values = _scratch.take("values", indptr[-1], np.dtype(np.uint16))
        sums = np.empty(rows.size)
        largest = 0
        for lo, hi, first, last in spans(local, bounds, widest_gap(group["data"]), _span(group)):
            span = slice(int(bounds[first]), int(bounds[last + 1]))
            is_plain, top = _take(
                _read(group, "data", span),
                _read(group, "indices", span),
                begin[lo:hi] - span.start,
                end[lo:hi] - span.start,
                target[lo:hi],
                genes,
                values,
                sums[lo:hi],
                file.num_genes,
            )
            if not is_plain:
                return None
            largest = max(largest, int(top))
    return Pieces(place[order], indptr, genes, _narrow(values, largest)), sums[order]


def _narrow(values: Array, largest: int) -> Array:
    """Return counts as bytes where the largest of them fits."""
    if largest > np.iinfo(np.uint8).max:
        return values
    small = _scratch.take("small values", values.size, np.dtype(np.uint8))
    np.copyto(small, values, casting="unsafe")
    return small


def _has_plain_types(group: Any) -> bool:
    values, indices = group["data"].dtype, group["indices"].dtype
    is_number = values.kind in "iuf" and values.isnative and values != np.float16
    return bool(is_number and indices.kind in "iu" and indices.isnative)


def _span(group: Any) -> int:
    chunks = group["data"].chunks
    return max(_ELEMENTS_AT_ONCE, _CHUNKS_AT_ONCE * chunks[0] if chunks else 0)


class _Scratch(threading.local):
    """Memory that each thread uses again: to get fresh pages costs more than to fill them."""

    def __init__(self) -> None:
        self._memory: dict[str, Array] = {}

    def take(self, name: str, size: int, dtype: np.dtype[Any]) -> Array:
        """Return an uninitialised [size] array; it ends the use of the last of that name."""
        num_bytes = int(size) * dtype.itemsize
        if name not in self._memory or self._memory[name].size < num_bytes:
            self._memory[name] = np.empty(num_bytes + num_bytes // 4, dtype=np.uint8)
        return self._memory[name][:num_bytes].view(dtype)


_scratch = _Scratch()


def _read(group: Any, name: str, span: slice) -> Array:
    stored, size = group[name], span.stop - span.start
    if not isinstance(stored, h5py.Dataset) or not size:
        return np.asarray(stored[span])
    values = _scratch.take(name, size, stored.dtype)
    stored.read_direct(values, span, slice(0, size))
    return values


@numba.njit(cache=True, nogil=True)
def _take(
    values: Array,
    indices: Array,
    begin: Array,
    end: Array,
    target: Array,
    to_genes: Array,
    to_values: Array,
    sums: Array,
    num_genes: int,
) -> tuple[bool, np.int64]:
    """Copy rows to their targets; tell whether all were plain, and the largest count."""
    num_odd, largest = 0, np.int64(0)
    for row in range(begin.size):
        size = end[row] - begin[row]
        sums[row] = 0
        if size == 0:
            continue
        row_values = values[begin[row] : end[row]]
        row_indices = indices[begin[row] : end[row]]
        out_values = to_values[target[row] : target[row] + size]
        out_genes = to_genes[target[row] : target[row] + size]
        total = np.int64(0)
        odd, top = 0, np.int32(0)
        for entry in range(size):
            # A value that is not one of the counts 1..65,535, NaN too, differs from all of them.
            count = np.int32(min(max(row_values[entry], 1), _LARGEST_COUNT))
            odd |= np.float64(count) != row_values[entry]
            out_values[entry] = count
            total += count
            top = np.int32(max(top, count))
        for entry in range(size):
            out_genes[entry] = row_indices[entry]
        for entry in range(size - 1):
            odd |= row_indices[entry] >= row_indices[entry + 1]
        odd |= row_indices[0] < 0
        odd |= row_indices[size - 1] >= num_genes
        num_odd += odd
        largest = max(largest, np.int64(top))
        sums[row] = total
    return num_odd == 0, largest
