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
        source, target = (block.indptr, block.indices, block.counts), self[:3]
        _copy_csr(*source, places, *target, first)

    def copy_rows(
        self, places: npt.NDArray[np.int64], out_SG: npt.NDArray[np.float32], slots: Array
    ) -> None:
        """Write row ``places[i]`` of the block, normalised and dense, to ``out_SG[slots[i]]``."""
        factors = self.size_factors[places]
        table = tabulate_log1p(factors)
        sparse = (self.indptr, self.indices, self.counts)
        num_large = _scatter_counts(*sparse, places, table, out_SG, slots)
        if num_large:
            large = _find_large(*sparse, places, factors, NUM_LEVELS, slots, num_large)
            out_SG[large[0], large[1]] = np.log1p(large[2])


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
) -> int:
    """Look up the small counts, and return how many are not."""
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
            num_large += int(count > last)
            row[np.uint32(row_genes[entry])] = levels[min(count, last)]
    return num_large


@njit(cache=True, nogil=True)
def _find_large(
    indptr: Array,
    indices: Array,
    counts: Array,
    places: Array,
    size_factors: Array,
    least: int,
    slots: Array,
    num_large: int,
) -> tuple[Array, Array, Array]:
    """Return slot, gene and normalised count of each count that is ``least`` or more."""
    slot, gene = np.empty(num_large, np.int64), np.empty(num_large, np.int64)
    value = np.empty(num_large, np.float32)
    found = 0
    for number in range(len(places)):
        for entry in range(indptr[places[number]], indptr[places[number] + 1]):
            if counts[entry] >= least:
                slot[found], gene[found] = slots[number], indices[entry]
                value[found] = np.float32(counts[entry]) / size_factors[number]
                found += 1
    return slot, gene, value


@njit(cache=True, nogil=True)
def _copy_csr(
    indptr: Array,
    indices: Array,
    counts: Array,
    places: Array,
    to_indptr: Array,
    to_indices: Array,
    to_counts: Array,
    first: int,
) -> None:
    for number in range(len(places)):
        target = to_indptr[first + number]
        for entry in range(indptr[places[number]], indptr[places[number] + 1]):
            to_indices[target] = indices[entry]
            to_counts[target] = counts[entry]
            target += 1
