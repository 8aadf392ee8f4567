"""Rows of raw counts of several stores that share the memory, in any order.

As ``row_reader``, which does the reading, but the rows stay sparse counts. Shape legend: N rows
asked for. Tests: ``pytest tests/unit/data_store/test_count_reader.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_store.cell_store import CellStore, Rows
from data_store.row_blocks import CountRows
from data_store.row_reader import StoreRows

_GIB = 1 << 30


class CountReader:
    """Rows of raw counts of one store.

    Parameters
    ----------
    store
        Where to read.
    wanted_rows
        Rows that will be asked for, ascending; others cannot be had.
    is_resident
        Hold all wanted rows in memory; else they are read when they are asked for.
    """

    def __init__(self, store: CellStore, wanted_rows: Rows, *, is_resident: bool) -> None:
        self._wanted = np.asarray(wanted_rows, dtype=np.int64)
        self.is_resident = is_resident
        held = self._wanted if is_resident else self._wanted[:0]
        self._rows = StoreRows(store, "all", held, dense=False)
        self._store = store
        self._ahead_rows = held[:0]
        self._ahead: CountRows | None = None

    def read_ahead(self, places_N: npt.NDArray[np.int64]) -> None:
        """Read wanted rows that ``take`` will be asked for, each chunk of the store once.

        They are kept until the next call. Not to be called while another thread takes rows.
        """
        if not self.is_resident:
            self._ahead = None
            self._ahead_rows = np.unique(self._wanted[places_N])
            self._ahead = self._rows.take_count_rows(self._ahead_rows)

    def take(self, places_N: npt.NDArray[np.int64]) -> CountRows:
        """Return wanted rows number ``places_N``, in the order asked for; from any thread."""
        rows_N = self._wanted[places_N]
        if self._ahead is not None:
            found_N = np.searchsorted(self._ahead_rows, rows_N)
            if np.array_equal(self._ahead_rows.take(found_N, mode="clip"), rows_N):
                block = self._store.allocate_counts(rows_N)
                block.copy_from(self._ahead, found_N, np.arange(len(rows_N)))
                return block
        return self._rows.take_count_rows(rows_N)


def open_counts(
    stores: Sequence[CellStore], wanted_rows: Sequence[Rows], *, resident_gib: float
) -> list[CountReader]:
    """Open readers of several stores that share the memory.

    Small stores are held first, whole or not at all.
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
