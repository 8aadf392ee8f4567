"""Gather rows of the expression matrix in any order, from memory or from the store.

One reader serves all loaders of a process, training and validation alike, so that the matrix is
held once. Shape legend: N rows asked for, G genes.
Tests: ``pytest tests/unit/data_store/test_row_reader.py``.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_store.cell_sets import CellStore, Rows
from data_store.schema import OutputSpace

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_MIN_CACHE_BYTES = 256 << 20
_BLOCK_BYTES = 4 << 20
# A chunk of the store holds this many rows: a block of whole chunks is decoded once. A read costs
# some milliseconds however small it is; beyond four chunks of a narrow matrix it reads too much.
_ROWS_PER_CHUNK = 64
_MOST_CHUNKS_PER_BLOCK = 4


class RowReader(Protocol):
    """Gives rows of one output space."""

    @property
    def num_genes(self) -> int:
        """G, columns of the space."""
        ...

    def take(self, rows_N: Rows, out_NG: npt.NDArray[np.float32]) -> None:
        """Write rows into a C-contiguous array. Safe to call from several threads."""
        ...


class ResidentRows:
    """Rows of a matrix that is held in memory."""

    def __init__(self, matrix: npt.NDArray[np.float32]) -> None:
        self._matrix = matrix

    @property
    def num_genes(self) -> int:
        """G, columns of the matrix."""
        return int(self._matrix.shape[1])

    def take(self, rows_N: Rows, out_NG: npt.NDArray[np.float32]) -> None:
        """Write rows into ``out_NG``.

        Raises
        ------
        IndexError
            For a row that is not in the matrix.
        """
        _check_rows(rows_N, len(self._matrix))
        # In its default mode numpy would gather into a buffer first and then copy it to `out`.
        np.take(self._matrix, rows_N, axis=0, out=out_NG, mode="clip")


class StreamedRows:
    """Rows read from the store in blocks, with the blocks used last kept in memory.

    The store keeps cells of a group together, so a set touches few blocks. Controls are used
    again and again and stay in the cache as long as it holds them.

    Parameters
    ----------
    store
        Where to read.
    space
        Which genes.
    cache_bytes
        Most bytes of cached blocks (one block is always kept).
    rows_per_block
        Rows read at once; default: 64 to 256, at most 4 MiB of them where that is possible.
    """

    def __init__(
        self,
        store: CellStore,
        space: OutputSpace,
        *,
        cache_bytes: int,
        rows_per_block: int | None = None,
    ) -> None:
        row_bytes = max(1, store.nbytes(space) // max(1, store.num_cells))
        self._store = store
        self._space: OutputSpace = space
        self._num_genes = row_bytes // np.dtype(np.float32).itemsize
        fitting_chunks = max(1, _BLOCK_BYTES // (row_bytes * _ROWS_PER_CHUNK))
        chunks_per_block = min(fitting_chunks, _MOST_CHUNKS_PER_BLOCK)
        self._rows_per_block = rows_per_block or chunks_per_block * _ROWS_PER_CHUNK
        self._max_blocks = max(1, cache_bytes // (self._rows_per_block * row_bytes))
        self._blocks: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_genes(self) -> int:
        """G, columns of the space."""
        return self._num_genes

    def take(self, rows_N: Rows, out_NG: npt.NDArray[np.float32]) -> None:
        """Write rows into ``out_NG``.

        Raises
        ------
        IndexError
            For a row that is not in the store.
        """
        _check_rows(rows_N, self._store.num_cells)
        block_N = rows_N // self._rows_per_block
        with self._lock:
            for block in np.unique(block_N).tolist():
                slots = np.flatnonzero(block_N == block)
                out_NG[slots] = self._read_block(block)[rows_N[slots] % self._rows_per_block]

    def _read_block(self, block: int) -> npt.NDArray[np.float32]:
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        start = block * self._rows_per_block
        stop = min(start + self._rows_per_block, self._store.num_cells)
        values = self._store.read_rows(self._space, start, stop)
        while len(self._blocks) >= self._max_blocks:
            self._blocks.popitem(last=False)
        self._blocks[block] = values
        return values


def open_rows(store: CellStore, space: OutputSpace, *, resident_gib: float) -> RowReader:
    """Open the reader that fits the memory.

    Parameters
    ----------
    store
        Where to read.
    space
        Which genes.
    resident_gib
        Hold the whole matrix if it is at most this large, GiB; otherwise cache at most this much
        of it (at least 0.25 GiB).
    """
    needed_bytes, allowed_bytes = store.nbytes(space), int(resident_gib * _GIB)
    if needed_bytes <= allowed_bytes:
        return ResidentRows(store.read_matrix(space))
    cache_bytes = max(allowed_bytes, _MIN_CACHE_BYTES)
    logger.info(
        "%s: %.2f GiB of expression do not fit data.resident_gib = %g; reading from the store "
        "with a cache of %.2f GiB",
        store.path,
        needed_bytes / _GIB,
        resident_gib,
        cache_bytes / _GIB,
    )
    return StreamedRows(store, space, cache_bytes=cache_bytes)


def _check_rows(rows_N: Rows, num_rows: int) -> None:
    if len(rows_N) and not (rows_N.min() >= 0 and rows_N.max() < num_rows):
        raise IndexError(f"rows {rows_N.min()} to {rows_N.max()} of a matrix of {num_rows}")
