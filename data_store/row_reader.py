"""Gather rows of the expression matrix in any order, from memory or from the store.

One reader serves all loaders of a process, training and validation alike. What fits the memory
is held there, dense if possible and else as counts; the rest is read from the store when asked for.
Shape legend: N rows asked for, G genes. Tests: ``pytest tests/unit/data_store/test_row_reader.py``.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_store.cell_store import CellStore, Rows
from data_store.row_blocks import CountRows, DenseRows, RowBlock, find_spans
from data_store.schema import OutputSpace
from data_store.shard_reader import ReadBuffer

logger = logging.getLogger(__name__)

_GIB = 1 << 30
# A chunk of the store holds about this many rows and is decoded whole: reading across a gap of so
# many costs no more than a read of its own.
_LARGEST_GAP = 64
_LONGEST_SPAN = 1024


class RowReader(Protocol):
    """Gives rows of one output space."""

    @property
    def num_genes(self) -> int:
        """G, columns of the space."""
        ...

    def take(self, rows_N: Rows, out_NG: npt.NDArray[np.float32]) -> None:
        """Write rows into a C-contiguous array. Safe to call from several threads."""
        ...


class StoreRows:
    """Rows of a store, some of which are held in memory.

    Parameters
    ----------
    store
        Where to read.
    space
        Which genes.
    held_rows
        Store rows to hold, ascending, without repetition; they are read now.
    dense
        Hold them dense: faster to copy, but 4 bytes a gene. ``X_hvg`` is dense in any case.
    """

    def __init__(
        self, store: CellStore, space: OutputSpace, held_rows: Rows, *, dense: bool
    ) -> None:
        self._store = store
        self._space: OutputSpace = space
        self._num_genes = store.nbytes(space) // np.dtype(np.float32).itemsize // store.num_cells
        self._lock = threading.Lock()
        self._buffer = ReadBuffer()
        self._place = np.full(store.num_cells, -1, dtype=np.int64)
        self._place[held_rows] = np.arange(len(held_rows))
        self._held = self._hold(np.asarray(held_rows, dtype=np.int64), dense=dense)

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
        StoreError
            When a shard is missing or damaged.
        """
        _check_rows(rows_N, len(self._place))
        place_N = self._place[rows_N]
        is_held = place_N >= 0
        if is_held.all():
            self._held.copy_rows(place_N, out_NG, np.arange(len(rows_N)))
            return
        slots = np.flatnonzero(is_held)
        self._held.copy_rows(place_N[slots], out_NG, slots)
        slots = np.flatnonzero(~is_held)
        slots = slots[np.argsort(rows_N[slots], kind="stable")]
        first = 0
        with self._lock:
            for span in _find_spans(rows_N[slots]):
                block = self._read(span)
                part = slots[first : first + len(span)]
                block.copy_rows(span - span[0], out_NG, part)
                first += len(span)

    def _read(self, span: Rows) -> RowBlock:
        return self._store.read_block(self._space, int(span[0]), int(span[-1]) + 1, self._buffer)

    def _hold(self, rows: Rows, *, dense: bool) -> RowBlock:
        if dense or self._space == "hvg":
            held = DenseRows.allocate(len(rows), self._num_genes)
            first = 0
            for span in _find_spans(rows):
                slots = np.arange(first, first + len(span))
                self._read(span).copy_rows(span - span[0], held.values, slots)
                first += len(span)
            return held
        sparse = self._store.allocate_counts(rows)
        first = 0
        for span in _find_spans(rows):
            block = self._read(span)
            assert isinstance(block, CountRows)
            sparse.fill_from(first, block, span - span[0])
            first += len(span)
        return sparse


def open_rows(
    store: CellStore, space: OutputSpace, wanted_rows: Rows, *, resident_gib: float
) -> StoreRows:
    """Open the reader that fits the memory.

    Parameters
    ----------
    store
        Where to read.
    space
        Which genes.
    wanted_rows
        Store rows that will be asked for, those used most (the controls) first. Others can be
        had too, but are never held.
    resident_gib
        Most memory for rows, GiB: all of the wanted rows dense if they fit, else all of them as
        they are stored (``X`` is sparse), else as many of the first as fit; the rest is read
        whenever it is asked for.
    """
    allowed_bytes = int(resident_gib * _GIB)
    _, first_use = np.unique(wanted_rows, return_index=True)
    rows = np.asarray(wanted_rows, dtype=np.int64)[np.sort(first_use)]
    dense_bytes = len(rows) * (store.nbytes(space) // store.num_cells)
    if dense_bytes <= allowed_bytes:
        return StoreRows(store, space, np.sort(rows), dense=True)
    stored_bytes = np.cumsum(store.row_nbytes(space)[rows])
    num_held = int(np.searchsorted(stored_bytes, allowed_bytes, side="right"))
    if num_held < len(rows):
        logger.info(
            "%s: %.2f GiB of expression do not fit data.resident_gib = %g; %d of %d cells are "
            "held in memory, controls first, and the others are read from the store",
            store.path,
            stored_bytes[-1] / _GIB,
            resident_gib,
            num_held,
            len(rows),
        )
    return StoreRows(store, space, np.sort(rows[:num_held]), dense=False)


def _find_spans(rows: Rows) -> list[Rows]:
    """Cut ascending rows into what one read should fetch."""
    return find_spans(rows, largest_gap=_LARGEST_GAP, longest=_LONGEST_SPAN)


def _check_rows(rows_N: Rows, num_rows: int) -> None:
    if len(rows_N) and not (rows_N.min() >= 0 and rows_N.max() < num_rows):
        raise IndexError(f"rows {rows_N.min()} to {rows_N.max()} of a matrix of {num_rows}")
