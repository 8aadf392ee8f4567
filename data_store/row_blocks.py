"""Rows of expression in memory, as counts or dense, and the compiled loops that copy them out.

A block comes from the store or holds a part of it; ``row_reader`` copies its rows into batches.
Shape legend: N rows of a block, G genes, S slots of the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numba import njit

from data_store.normalize import NUM_LEVELS, tabulate_log1p

Array = npt.NDArray[Any]
_LARGEST_UINT16 = np.iinfo(np.uint16).max


class RowBlock(Protocol):
    """Rows of one output space."""

    def copy_rows(
        self, places: npt.NDArray[np.int64], out_SG: npt.NDArray[np.float32], slots: Array
    ) -> None:
        """Write row ``places[i]`` of the block to ``out_SG[slots[i]]``, for each i.

        Both must be in range (it is not checked), and ``out_SG`` C-contiguous.
        """
        ...


class DenseRows(NamedTuple):
    """Rows of a dense matrix."""

    values: npt.NDArray[np.float32]
    """[N, G]."""

    @classmethod
    def allocate(cls, num_rows: int, num_genes: int) -> DenseRows:
        """Return a block to be filled."""
        return cls(np.empty((num_rows, num_genes), dtype=np.float32))

    def copy_rows(
        self, places: npt.NDArray[np.int64], out_SG: npt.NDArray[np.float32], slots: Array
    ) -> None:
        """Write row ``places[i]`` of the block to ``out_SG[slots[i]]``, for each i."""
        _copy_dense(self.values, places, out_SG, slots)


class CountRows(NamedTuple):
    """Rows of raw counts, copied out as log1p of normalised counts."""

    indptr: npt.NDArray[np.int64]
    """[N + 1] where each row begins."""
    indices: Array
    """[nnz] gene of each count, any integer type."""
    counts: Array
    """[nnz] counts, any unsigned type."""
    size_factors: npt.NDArray[np.float32]
    """[N] divisors of the counts."""

    @staticmethod
    def bytes_per_nonzero(num_genes: int, count_dtype: str) -> int:
        """Return what a count with its gene takes in an allocated block."""
        return np.dtype(count_dtype).itemsize + _index_dtype(num_genes).itemsize

    @classmethod
    def allocate(
        cls,
        row_nnz: npt.NDArray[np.int64],
        num_genes: int,
        count_dtype: str,
        size_factors: npt.NDArray[np.float32],
    ) -> CountRows:
        """Return a block to be filled, with the smallest type for genes."""
        indptr = np.concatenate([[0], np.cumsum(row_nnz)]).astype(np.int64)
        indices = np.empty(indptr[-1], dtype=_index_dtype(num_genes))
        return cls(indptr, indices, np.empty(indptr[-1], dtype=count_dtype), size_factors)

    def fill_from(self, first: int, block: CountRows, places: npt.NDArray[np.int64]) -> None:
        """Copy rows of another block to the rows from ``first`` on, which have their sizes."""
        self.copy_from(block, places, np.arange(first, first + len(places)))

    def copy_from(self, block: CountRows, places: npt.NDArray[np.int64], slots: Array) -> None:
        """Copy row ``places[i]`` of another block to row ``slots[i]``, which has its size."""
        _copy_csr(block.indptr, block.indices, block.counts, places, *self[:3], slots)

    def copy_rows(
        self, places: npt.NDArray[np.int64], out_SG: npt.NDArray[np.float32], slots: Array
    ) -> None:
        """Write row ``places[i]`` of the block, normalised and dense, to ``out_SG[slots[i]]``."""
        factors = self.size_factors[places]
        table = tabulate_log1p(factors)
        # Untouched pages cost nothing, and few counts are large.
        large = np.empty((2, int((self.indptr[places + 1] - self.indptr[places]).sum())), np.int64)
        sparse = (self.indptr, self.indices, self.counts)
        num_large = _scatter_counts(*sparse, places, table, out_SG, slots, large)
        if num_large:
            numbers, entries = large[:, :num_large]
            values = self.counts[entries].astype(np.float32) / factors[numbers]
            out_SG[slots[numbers], self.indices[entries]] = np.log1p(values)


def find_spans(
    rows: npt.NDArray[np.int64], *, largest_gap: int, longest: int
) -> list[npt.NDArray[np.int64]]:
    """Cut ascending rows where the next one is far away or the span gets too long."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) > largest_gap) + 1
    spans: list[npt.NDArray[np.int64]] = []
    for run in np.split(rows, cuts):
        spans += np.split(run, np.flatnonzero(np.diff((run - run[0]) // longest)) + 1)
    return spans


def _index_dtype(num_genes: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if num_genes <= _LARGEST_UINT16 + 1 else np.int32)


@njit(cache=True, nogil=True)
def _copy_dense(values: Array, places: Array, out: Array, slots: Array) -> None:
    for number in range(len(places)):
        out[slots[number]] = values[places[number]]


@njit(cache=True, nogil=True)
def _scatter_counts(
    indptr: Array,
    indices: Array,
    counts: Array,
    places: Array,
    table: Array,
    out: Array,
    slots: Array,
    large: Array,
) -> int:
    """Look up the small counts; note number and entry of the others, and return how many."""
    num_large = 0
    # Unsigned numbers index without a test for negative ones.
    last = np.uint32(table.shape[1] - 1)
    for number in range(len(places)):
        row, levels = out[slots[number]], table[number]
        row[:] = 0
        begin, end = indptr[places[number]], indptr[places[number] + 1]
        row_genes, row_counts = indices[begin:end], counts[begin:end]
        for entry in range(row_genes.size):
            count = np.uint32(row_counts[entry])
            if count > last:
                large[0, num_large], large[1, num_large] = number, begin + entry
                num_large += 1
            else:
                row[np.uint32(row_genes[entry])] = levels[count]
    return num_large


@njit(cache=True, nogil=True)
def _copy_csr(
    indptr: Array,
    indices: Array,
    counts: Array,
    places: Array,
    to_indptr: Array,
    to_indices: Array,
    to_counts: Array,
    slots: Array,
) -> None:
    for number in range(len(places)):
        begin, end = indptr[places[number]], indptr[places[number] + 1]
        target = to_indptr[slots[number]]
        row_genes, row_counts = indices[begin:end], counts[begin:end]
        out_genes = to_indices[target : target + row_genes.size]
        out_counts = to_counts[target : target + row_genes.size]
        for entry in range(row_genes.size):
            out_genes[entry] = row_genes[entry]
        for entry in range(row_genes.size):
            out_counts[entry] = row_counts[entry]
