"""Rows of expression in memory, sparse or dense, and the compiled loops that copy them out.

A block comes from the store or holds a part of it; ``row_reader`` copies its rows into batches.
Shape legend: N rows of a block, G genes, S slots of the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numba import njit

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


class CsrRows(NamedTuple):
    """Rows of a sparse matrix."""

    indptr: npt.NDArray[np.int64]
    """[N + 1] where each row begins."""
    indices: Array
    """[nnz] gene of each value, any integer type."""
    data: npt.NDArray[np.float32]
    """[nnz] values."""
    num_genes: int
    """G."""

    @staticmethod
    def bytes_per_nonzero(num_genes: int) -> int:
        """Return what a value with its gene takes in an allocated block."""
        return np.dtype(np.float32).itemsize + _index_dtype(num_genes).itemsize

    @classmethod
    def allocate(cls, row_nnz: npt.NDArray[np.int64], num_genes: int) -> CsrRows:
        """Return a block to be filled, with the smallest type for genes."""
        indptr = np.concatenate([[0], np.cumsum(row_nnz)]).astype(np.int64)
        indices = np.empty(indptr[-1], dtype=_index_dtype(num_genes))
        return cls(indptr, indices, np.empty(indptr[-1], dtype=np.float32), num_genes)

    def fill_from(self, first: int, block: CsrRows, places: npt.NDArray[np.int64]) -> None:
        """Copy rows of another block to the rows from ``first`` on, which have their sizes."""
        _copy_csr(block.indptr, block.indices, block.data, places, *self[:3], first)

    def copy_rows(
        self, places: npt.NDArray[np.int64], out_SG: npt.NDArray[np.float32], slots: Array
    ) -> None:
        """Write row ``places[i]`` of the block, densified, to ``out_SG[slots[i]]``."""
        _scatter_csr(self.indptr, self.indices, self.data, places, out_SG, slots)


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
def _scatter_csr(
    indptr: Array, indices: Array, data: Array, places: Array, out: Array, slots: Array
) -> None:
    for number in range(len(places)):
        row = out[slots[number]]
        row[:] = 0
        for entry in range(indptr[places[number]], indptr[places[number] + 1]):
            row[indices[entry]] = data[entry]


@njit(cache=True, nogil=True)
def _copy_csr(
    indptr: Array,
    indices: Array,
    data: Array,
    places: Array,
    to_indptr: Array,
    to_indices: Array,
    to_data: Array,
    first: int,
) -> None:
    for number in range(len(places)):
        target = to_indptr[first + number]
        for entry in range(indptr[places[number]], indptr[places[number] + 1]):
            to_indices[target] = indices[entry]
            to_data[target] = data[entry]
            target += 1
