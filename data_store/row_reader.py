"""Gather rows of the expression matrix in any order, from memory or from the store.

One reader serves all loaders of a process, training and validation alike. What fits the memory
is held there, dense if possible and else as counts; the rest is read from the store when asked for.
Shape legend: N rows asked for, G genes. Tests: ``pytest tests/unit/data_store/test_row_reader.py``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_store.array_pool import ArrayPool
from data_store.cell_store import CellStore, Rows
from data_store.row_blocks import Allocate, CountRows, DenseRows, RowBlock, find_spans
from data_store.schema import CellCounts, CellSpace
from data_store.shard_reader import ReadBuffer
from data_store.shared_copies import SharedCopies

logger = logging.getLogger(__name__)

HeldRows: TypeAlias = DenseRows | CountRows

_GIB = 1 << 30
# A chunk of the store holds about this many rows and is decoded whole: reading across a gap of so
# many costs no more than a read of its own.
_LARGEST_GAP = 64
_LONGEST_SPAN = 1024


class RowReader(Protocol):
    """Gives rows of one space."""

    @property
    def num_genes(self) -> int:
        """G, columns of the space."""
        ...

    def take(self, rows_N: Rows, out_NG: npt.NDArray[np.float32]) -> None:
        """Write rows into a C-contiguous array. Safe to call from several threads."""
        ...

    def take_counts(self, rows_BS: Rows, pool: ArrayPool) -> CellCounts:
        """Gather rows as counts, in memory of the pool; a negative row is an empty slot."""
        ...


class StoreRows:
    """Rows of a store, some of which are held in memory.

    Parameters
    ----------
    store
        Where to read.
    space
        Which genes, or the embedding.
    held_rows
        Store rows to hold, ascending, without repetition; they are read now.
    dense
        Hold them dense: faster to copy, but 4 bytes a gene. Other spaces than ``all`` are dense in
        any case.
    copies
        Where the processes of this node share what they hold; None, or no room there: each has
        its own.
    """

    def __init__(
        self,
        store: CellStore,
        space: CellSpace,
        held_rows: Rows,
        *,
        dense: bool,
        copies: SharedCopies | None = None,
    ) -> None:
        self._store = store
        self._space: CellSpace = space
        self._num_genes = store.nbytes(space) // np.dtype(np.float32).itemsize // store.num_cells
        self._lock = threading.Lock()
        self._buffer = ReadBuffer()
        self._place = np.full(store.num_cells, -1, dtype=np.int64)
        self._place[held_rows] = np.arange(len(held_rows))
        self._held = self._hold(np.asarray(held_rows, dtype=np.int64), copies, dense=dense)

    @property
    def num_genes(self) -> int:
        """G, columns of the space."""
        return self._num_genes

    @property
    def held_gib(self) -> float:
        """Memory that the held rows take, GiB."""
        return sum(array.nbytes for array in self._held.bulk) / _GIB

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
        self._gather(rows_N, lambda block, places, slots: block.copy_rows(places, out_NG, slots))

    def take_counts(self, rows_BS: Rows, pool: ArrayPool) -> CellCounts:
        """Gather rows as counts, in memory of the pool; a negative row is an empty slot.

        The reader must be of the space ``all`` and hold no dense rows.

        Raises
        ------
        IndexError
            For a row that is not in the store.
        StoreError
            When a shard is missing or damaged.
        """
        has_cell_BS = rows_BS >= 0
        block = self.take_count_rows(rows_BS[has_cell_BS], pool.take)
        return block.spread(has_cell_BS, self._num_genes)

    def take_count_rows(self, rows_N: Rows, allocate: Allocate = np.empty) -> CountRows:
        """Gather rows as counts, one after the other, in memory from ``allocate``.

        As ``take_counts``, and with its errors.
        """
        _check_rows(rows_N, len(self._place))
        block = self._store.allocate_counts(rows_N, allocate)

        def copy(source: RowBlock, places: Rows, slots: Rows) -> None:
            assert isinstance(source, CountRows), "a dense reader has no counts"
            block.copy_from(source, places, slots)

        self._gather(rows_N, copy)
        return block

    def _gather(self, rows_N: Rows, copy: Callable[[RowBlock, Rows, Rows], None]) -> None:
        """Call ``copy(block, places, slots)`` until each of the rows is in its slot."""
        place_N = self._place[rows_N]
        is_held = place_N >= 0
        if is_held.all():
            copy(self._held, place_N, np.arange(len(rows_N)))
            return
        slots = np.flatnonzero(is_held)
        copy(self._held, place_N[slots], slots)
        slots = np.flatnonzero(~is_held)
        slots = slots[np.argsort(rows_N[slots], kind="stable")]
        first = 0
        with self._lock:
            for span in _find_spans(rows_N[slots]):
                copy(self._read(span), span - span[0], slots[first : first + len(span)])
                first += len(span)

    def _read(self, span: Rows) -> RowBlock:
        return self._store.read_block(self._space, int(span[0]), int(span[-1]) + 1, self._buffer)

    def _hold(self, rows: Rows, copies: SharedCopies | None, *, dense: bool) -> HeldRows:
        block: HeldRows
        if dense or self._space != "all":
            block = DenseRows.allocate(len(rows), self._num_genes)
        else:
            block = self._store.allocate_counts(rows)
        if copies is not None and len(rows):
            # What was allocated is not touched yet, so it takes no memory.
            content = (self._store.digest.encode(), self._space.encode(), rows.tobytes())
            shared = copies.share(
                content, block.bulk, lambda bulk: self._fill(block.with_bulk(bulk), rows)
            )
            if shared is not None:
                return block.with_bulk(shared)
        self._fill(block, rows)
        return block

    def _fill(self, held: HeldRows, rows: Rows) -> None:
        first = 0
        for span in _find_spans(rows):
            slots = np.arange(first, first + len(span))
            block, places = self._read(span), span - span[0]
            if isinstance(held, DenseRows):
                block.copy_rows(places, held.values, slots)
            else:
                assert isinstance(block, CountRows)
                held.copy_from(block, places, slots)
            first += len(span)


def open_rows(
    store: CellStore,
    space: CellSpace,
    wanted_rows: Rows,
    *,
    resident_gib: float,
    as_counts: bool = False,
    copies: SharedCopies | None = None,
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
    as_counts
        Hold the space ``all`` sparse even if it fits dense, so that ``take_counts`` can be used.
    copies
        Where the processes of this node share what they hold; None: each has its own.
    """
    allowed_bytes = int(resident_gib * _GIB)
    _, first_use = np.unique(wanted_rows, return_index=True)
    rows = np.asarray(wanted_rows, dtype=np.int64)[np.sort(first_use)]
    dense_bytes = len(rows) * (store.nbytes(space) // store.num_cells)
    if dense_bytes <= allowed_bytes and not (as_counts and space == "all"):
        return StoreRows(store, space, np.sort(rows), dense=True, copies=copies)
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
    return StoreRows(store, space, np.sort(rows[:num_held]), dense=False, copies=copies)


def _find_spans(rows: Rows) -> list[Rows]:
    """Cut ascending rows into what one read should fetch."""
    return find_spans(rows, largest_gap=_LARGEST_GAP, longest=_LONGEST_SPAN)


def _check_rows(rows_N: Rows, num_rows: int) -> None:
    if len(rows_N) and not (rows_N.min() >= 0 and rows_N.max() < num_rows):
        raise IndexError(f"rows {rows_N.min()} to {rows_N.max()} of a matrix of {num_rows}")
