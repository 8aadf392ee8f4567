"""Gather rows of raw counts of a store in any order, from memory or from the disk.

As ``row_reader``, but the rows stay sparse counts. Shape legend: N rows asked for.
Tests: ``pytest tests/unit/data_store/test_count_reader.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_store.cell_store import CellStore, Rows
from data_store.row_blocks import CountRows, find_spans
from data_store.shard_reader import ReadBuffer

_GIB = 1 << 30
# See ``row_reader``.
_LARGEST_GAP = 64
_LONGEST_SPAN = 1024


class CountReader:
    """Rows of raw counts of one store.

    Parameters
    ----------
    store
        Where to read.
    wanted_rows
        Rows that will be asked for, ascending; others cannot be had.
    is_resident
        Hold all wanted rows in memory; else each is read when it is asked for.
    """

    def __init__(self, store: CellStore, wanted_rows: Rows, *, is_resident: bool) -> None:
        self._store = store
        self._rows = np.asarray(wanted_rows, dtype=np.int64)
        self._buffer = ReadBuffer()
        self._lock = threading.Lock()
        self._held = self._read_ascending(self._rows) if is_resident else None

    @property
    def is_resident(self) -> bool:
        """Whether the rows are in memory."""
        return self._held is not None

    def take(self, places_N: npt.NDArray[np.int64]) -> CountRows:
        """Return wanted rows number ``places_N``, in the order asked for; from any thread."""
        rows_N = self._rows[places_N]
        taken = self._store.allocate_counts(rows_N)
        if self._held is not None:
            taken.fill_from(0, self._held, places_N)
            return taken
        order = np.argsort(rows_N, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        with self._lock:
            ascending = self._read_ascending(rows_N[order])
        taken.fill_from(0, ascending, back)
        return taken

    def _read_ascending(self, rows: Rows) -> CountRows:
        counts = self._store.allocate_counts(rows)
        first = 0
        for span in find_spans(rows, largest_gap=_LARGEST_GAP, longest=_LONGEST_SPAN):
            start, stop = int(span[0]), int(span[-1]) + 1
            block = self._store.read_block("all", start, stop, self._buffer)
            assert isinstance(block, CountRows)
            counts.fill_from(first, block, span - start)
            first += len(span)
        return counts


def open_counts(
    stores: Sequence[CellStore], wanted_rows: Sequence[Rows], *, resident_gib: float
) -> list[CountReader]:
    """Open readers of several stores that share the memory.

    Small stores are held first, whole or not at all: a store that is read from the disk is read
    in stretches, of which a few held rows would save nothing.
    """
    sizes = [
        int(store.row_nbytes("all")[rows].sum())
        for store, rows in zip(stores, wanted_rows, strict=True)
    ]
    left, resident = int(resident_gib * _GIB), set()
    for number in np.argsort(sizes, kind="stable").tolist():
        if sizes[number] <= left:
            resident.add(number)
            left -= sizes[number]
    return [
        CountReader(store, rows, is_resident=number in resident)
        for number, (store, rows) in enumerate(zip(stores, wanted_rows, strict=True))
    ]
