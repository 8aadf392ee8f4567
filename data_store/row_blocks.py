"""Rows of expression in memory, as counts or dense, and the compiled loops that copy them out.

A block comes from the store or holds a part of it; ``row_reader`` copies its rows into batches.
Shape legend: N rows of a block, G genes, S slots of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from data_store.normalize import NUM_LEVELS, tabulate_log1p
from data_store.schema import CellCounts

Array = npt.NDArray[Any]
Allocate: TypeAlias = Callable[[tuple[int, ...], np.dtype[Any]], Array]
"""Gives an uninitialised array of a shape and type, as ``np.empty`` does."""
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

    @property
    def bulk(self) -> tuple[Array, ...]:
        """The arrays that grow with the data."""
        return (self.values,)

    def with_bulk(self, bulk: Sequence[Array]) -> DenseRows:
        """Return a block with these arrays as its bulk."""
        return DenseRows(*bulk)

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
        allocate: Allocate = np.empty,
    ) -> CountRows:
        """Return a block to be filled, with the smallest type for genes."""
        indptr = np.concatenate([[0], np.cumsum(row_nnz)]).astype(np.int64)
        shape = (int(indptr[-1]),)
        indices = allocate(shape, _index_dtype(num_genes))
        return cls(indptr, indices, allocate(shape, np.dtype(count_dtype)), size_factors)

    def spread(self, has_cell_BS: npt.NDArray[np.bool_], num_genes: int) -> CellCounts:
        """Put the rows into the slots that hold a cell, one after the other."""
        nnz_BS = np.zeros(has_cell_BS.shape, dtype=np.int64)
        nnz_BS[has_cell_BS] = np.diff(self.indptr)
        log1p_NL = tabulate_log1p(self.size_factors)
        if has_cell_BS.all():
            log1p_BSL = log1p_NL.reshape(*has_cell_BS.shape, NUM_LEVELS)
        else:
            log1p_BSL = np.zeros((*has_cell_BS.shape, NUM_LEVELS), dtype=np.float32)
            log1p_BSL[has_cell_BS] = log1p_NL
        large = np.empty(0, dtype=np.int64)
        if np.iinfo(self.counts.dtype).max >= NUM_LEVELS:
            large = np.flatnonzero(self.counts >= NUM_LEVELS)
        row_M = np.searchsorted(self.indptr, large, side="right") - 1
        value_M = np.log1p(self.counts[large].astype(np.float32) / self.size_factors[row_M])
        slot_M = np.flatnonzero(has_cell_BS)[row_M]
        return CellCounts(
            counts_K=self.counts,
            genes_K=self.indices,
            nnz_BS=nnz_BS,
            log1p_BSL=log1p_BSL,
            large_place_M=slot_M * num_genes + self.indices[large],
            large_value_M=value_M,
            num_genes=num_genes,
        )

    @property
    def bulk(self) -> tuple[Array, ...]:
        """The arrays that grow with the data."""
        return self.indices, self.counts

    def with_bulk(self, bulk: Sequence[Array]) -> CountRows:
        """Return the same block with these arrays as its bulk."""
        indices, counts = bulk
        return self._replace(indices=indices, counts=counts)

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
